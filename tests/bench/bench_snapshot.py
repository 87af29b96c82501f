"""What does a snapshot of the host tier do to those whom it serves, beside one by fork()?

    make bench-snapshot     (or: python tests/bench/bench_snapshot.py [--quick])

Look-ups and inserts arrive at a fixed rate while a snapshot is written: none, ours, or the child of a fork() that
writes its copy of the memory with the same code. A process holds the tier and alternates between windows without and
with; see `snapshot_windows`. fork() needs private memory, in pages of 4 KiB or huge ones; ours uses shared memory, as
the engine does. Needs 20 GiB of memory and of disk for the largest size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import snapshot_windows
from bench.results import OUT, circumstances, say, shown, table, warn_when_busy, write_json
from bench.snapshot_plot import plot
from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.host import HostIndex

# memory -> windows of one round, and rounds at the small and at the large size
ROUNDS: dict[str, tuple[list[str], int, int]] = {
    "shared": (["none", "ours"], 4, 2),
    "4k": (["none", "fork"], 2, 1),
    "huge": (["none", "fork"], 2, 1),
}
BUSY = ["busy-none", "busy-ours", "busy-thread"]  # at the small size
MAX_STALL_RATIO = 0.002
NUM_RESAMPLES = 2000

Found = dict[str, Any]  # of one process: "about", and latencies by number of the window


def run(kind: str, gib: float, windows: list[str]) -> Found:
    path = OUT / f"snapshot-{kind}-{gib:g}.npz"
    subprocess.run([sys.executable, snapshot_windows.__file__, kind, str(gib), path, *windows], check=True)
    with np.load(path) as content:
        found: Found = {"about": json.loads(str(content["about"])), "latencies": [], "waits": []}
        for number in range(len(windows)):
            found["latencies"].append(content[f"{number}.latencies"])
            found["waits"].append(content.get(f"{number}.waits"))
    path.unlink()
    return found


def latencies_of(found: Found, window: str) -> list[np.ndarray]:
    windows = found["about"]["windows"]
    return [array for array, facts in zip(found["latencies"], windows, strict=True) if facts["window"] == window]


def quantiles(rounds: list[np.ndarray]) -> dict[str, float]:
    pooled = np.concatenate(rounds)
    names = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}
    found = {name: 1e3 * float(np.quantile(pooled, q)) for name, q in names.items()}
    # The more rounds, the longer the longest of all, so it is the median over the rounds.
    return {**found, "longest_ms": 1e3 * statistics.median(float(one.max()) for one in rounds)}


def added_by(name: str, found: Found) -> dict[str, Any]:
    """The longest latency of each window, less that of the window before it without a snapshot."""
    without, with_it = ([1e3 * float(a.max()) for a in latencies_of(found, window)] for window in ("none", name))
    added = [b - a for a, b in zip(without, with_it, strict=True)]
    return {"added_ms": statistics.median(added), "rounds_ms": added, "none_longest_ms": without}


def ratios(stalls: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Ours over fork's, and the smallest ratio that could be told from 0 in this run."""
    none, fork_ms = stalls["ours"]["none_longest_ms"], stalls["fork, 4k"]["added_ms"]
    return {
        "stall_ratio_to_fork_4k": max(0.0, stalls["ours"]["added_ms"]) / fork_ms,
        "noise_ratio_to_fork_4k": (max(none) - min(none)) / fork_ms,
    }


def difference_of_p999(none: list[np.ndarray], other: list[np.ndarray]) -> dict[str, float]:
    """In ms, with the 95 % interval of a bootstrap over whole seconds: operations of a second share their fate."""
    random = np.random.default_rng(0)

    def resampled(rounds: list[np.ndarray]) -> np.ndarray:
        blocks = [block for a in rounds for block in np.array_split(a, max(1, len(a) // snapshot_windows.RATE))]
        picks = random.integers(len(blocks), size=(NUM_RESAMPLES, len(blocks)))
        return np.array([np.quantile(np.concatenate([blocks[i] for i in pick]), 0.999) for pick in picks])

    differences = 1e3 * (resampled(other) - resampled(none))
    low, high = np.quantile(differences, [0.025, 0.975])
    measured = np.quantile(np.concatenate(other), 0.999) - np.quantile(np.concatenate(none), 0.999)
    return {"difference_ms": 1e3 * float(measured), "low_ms": float(low), "high_ms": float(high)}


def index_costs(num_entries: int) -> dict[str, float]:
    """Microseconds that the calls of a snapshot keep the lock of an index of so many entries."""
    index = HostIndex(num_entries * 256, LRU())
    for i in range(num_entries):
        entry = index.reserve(i.to_bytes(32), 256, 1)
        assert entry is not None
        index.commit(entry)
    times: dict[str, list[float]] = {"begin": [], "next": [], "end": []}

    def timed(name: str, call: Any) -> Any:
        before = time.perf_counter()
        answer = call()
        times[name].append(1e6 * (time.perf_counter() - before))
        return answer

    for _ in range(9):  # cancelled half-way each time
        timed("begin", index.begin_snapshot)
        for _ in range(num_entries // 2):
            index.unpin(timed("next", index.next_of_snapshot))
        timed("end", index.end_snapshot)
    medians = {f"{name}_us": statistics.median(values) for name, values in times.items()}
    return {"entries": num_entries, **medians, "next_p999_us": float(np.quantile(times["next"], 0.999))}


def report(gib: float, runs: Mapping[str, Found]) -> dict[str, Any]:
    rows: dict[str, dict[str, float]] = {}
    for kind, (windows, _, _) in ROUNDS.items():
        for window in windows:
            rows[f"{window}, {kind}"] = quantiles(latencies_of(runs[kind], window))
    busy = {window: quantiles(rounds) for window in BUSY if (rounds := latencies_of(runs["shared"], window))}
    stalls = {"ours": added_by("ours", runs["shared"])}
    stalls |= {f"fork, {kind}": added_by("fork", runs[kind]) for kind in ("4k", "huge")}
    begun = {
        f"{facts['window']}, {kind}": max(1e3 * f["began_s"] for f in found["about"]["windows"] if f["window"] == name)
        for kind, found in runs.items()
        for facts in found["about"]["windows"]
        if (name := facts["window"]) in ("ours", "fork")
    }
    p999 = difference_of_p999(latencies_of(runs["shared"], "none"), latencies_of(runs["shared"], "ours"))
    waits = {
        window: [
            1e3 * float(wait.max())
            for wait, facts in zip(runs["shared"]["waits"], runs["shared"]["about"]["windows"], strict=True)
            if facts["window"] == window
        ]
        for window in ("none", "ours")
    }
    return {
        "gib": gib,
        **ratios(stalls),
        "latencies": rows,
        "busy_interpreter": busy,
        "added_to_the_longest": stalls,
        "call_that_begins_ms": begun,
        "call_ratio_to_fork_4k": begun["ours, shared"] / begun["fork, 4k"],
        "longest_wait_for_the_lock_ms": waits,
        "p999_ours_less_none": p999,
        "processes": {kind: found["about"] for kind, found in runs.items()},
    }


def show(size: Mapping[str, Any]) -> None:
    header = [f"{size['gib']:g} GiB, ms", "p50", "p99", "p99.9", "longest"]
    rows = {**size["latencies"], **size["busy_interpreter"]}
    print(table(header, [[name, *(f"{value:.3f}" for value in row.values())] for name, row in rows.items()]))
    for name, stall in size["added_to_the_longest"].items():
        print(f"{name}: adds {stall['added_ms']:.2f} ms to the longest latency (rounds {_list(stall['rounds_ms'])})")
    floor = size["added_to_the_longest"]["ours"]["none_longest_ms"]
    print(f"without a snapshot the longest latency of a window is {_list(floor)} ms: less than that spread is noise")
    ratio, noise, call = (size[f"{name}_to_fork_4k"] for name in ("stall_ratio", "noise_ratio", "call_ratio"))
    print(f"ours over fork (4k), added to the longest: {ratio:.4f}, noise {noise:.4f}; target <= {MAX_STALL_RATIO}")
    print(f"calls that begin a snapshot, ms: {size['call_that_begins_ms']}; ours over fork (4k): {call:.5f}")
    p999 = size["p999_ours_less_none"]
    low, high = p999["low_ms"], p999["high_ms"]
    verdict = "distinguishable" if low > 0 or high < 0 else "not distinguishable"
    print(f"p99.9, ours less none: {p999['difference_ms']:.2f} ms [{low:.2f}, {high:.2f}]: {verdict}")


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of a GiB only")
    options = parser.parse_args()
    warn_when_busy()
    head = circumstances()
    OUT.mkdir(exist_ok=True)
    sizes, timelines = [], {}
    for gib, column in [(0.25, 1)] if options.quick else [(1.0, 1), (8.0, 2)]:
        runs = {}
        for kind, shape in ROUNDS.items():
            say(f"{gib:g} GiB, memory: {kind}")
            extra = BUSY if kind == "shared" and column == 1 else []
            runs[kind] = run(kind, gib, shape[0] * int(shape[column]) + extra)  # type: ignore[call-overload]
        sizes.append(report(gib, runs))
        timelines[gib] = {
            f"{name}, {kind}": latencies_of(runs[kind], name)
            for kind, name in [("shared", "none"), ("shared", "ours"), ("4k", "fork"), ("huge", "fork")]
        }
        show(sizes[-1])
    costs = index_costs(200_000)
    say(f"index of 200,000 entries: {costs}")
    write_json(OUT / "bench_snapshot.json", {"circumstances": head, "sizes": sizes, "index": costs})
    plot(timelines, OUT / "bench_snapshot.png")
    say(f"written to {shown(OUT / 'bench_snapshot.json')} and .png")


if __name__ == "__main__":
    main()
