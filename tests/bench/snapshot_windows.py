"""Stretches of traffic on one host tier, in a process of their own, with and without a snapshot.

    python tests/bench/snapshot_windows.py MEMORY GIB OUT.npz WINDOW...       (started by bench_snapshot.py)

MEMORY: see `snapshot_host.Memory`. WINDOW: `none`, `ours`, `thread` (our snapshot, written in a thread of this process)
or `fork`, which last as long as the snapshot (`none` as long as one at full bandwidth). Traffic comes at a fixed rate,
whether or not earlier operations are done, and a latency counts from the moment at which the operation was due: it
counts a stall for all that became due in it. With `busy-` in front, look-ups follow each other without a pause: the
interpreter is never idle.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.snapshot_host import Host
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.host import HostEntry
from vlcache_connector.store.snapshot.folder import UNBOUNDED
from vlcache_connector.store.snapshot.program import NICENESS, Pace
from vlcache_connector.store.snapshot.wire import SharedSlab
from vlcache_connector.store.snapshot.writer import SnapshotState, SnapshotWriter

RATE = 1000  # operations per second
INSERT_EVERY = 40  # operations; the others are look-ups
BYTES_PER_S = 256 << 20  # cap on all snapshots
_PR_SET_TIMERSLACK = 29

IsOver = Callable[[float], bool]  # given the seconds since the start
Serve = Callable[[Host, IsOver, Callable[[], None]], dict[str, Any]]


def at_a_fixed_rate(host: Host, is_over: IsOver, begin: Callable[[], None]) -> dict[str, Any]:
    """The snapshot begins within the first operation."""
    latencies, waits = [], []
    began_s = 0.0
    start = time.perf_counter() + 0.01
    i = host.refused = 0
    while not is_over(time.perf_counter() - start):
        due = start + i / RATE
        if (early := due - time.perf_counter()) > 0:
            time.sleep(early)
        host.waited_s = 0.0
        (host.look_up if i % INSERT_EVERY else host.insert)()
        if i == 0:
            before = time.perf_counter()
            begin()
            began_s = time.perf_counter() - before
        latencies.append(time.perf_counter() - due)
        waits.append(host.waited_s)
        i += 1
    facts = {"began_s": began_s, "seconds": i / RATE, "inserts": -(-i // INSERT_EVERY), "refused": host.refused}
    return {"latencies": np.array(latencies), "waits": np.array(waits), "facts": facts}


def without_a_pause(host: Host, is_over: IsOver, begin: Callable[[], None]) -> dict[str, Any]:
    latencies = []
    begin()
    start = before = time.perf_counter()
    while not is_over(before - start):
        for _ in range(100):
            host.look_up()
            after = time.perf_counter()
            latencies.append(after - before)
            before = after
    facts = {"seconds": before - start, "look_ups_per_s": len(latencies) / (before - start)}
    return {"latencies": np.array(latencies), "facts": facts}


def none(host: Host, folder: Path, serve: Serve) -> dict[str, Any]:
    seconds = len(host.memory.view) / BYTES_PER_S
    return serve(host, lambda elapsed: elapsed > seconds, lambda: None)


def ours(host: Host, folder: Path, serve: Serve) -> dict[str, Any]:
    slab = SharedSlab(host.memory.fd, host.memory.view)
    writer = SnapshotWriter(host.index, host.lock, host.describe, [slab])
    time.sleep(1)  # the process starts with the engine, not with the snapshot
    try:
        found = serve(
            host,
            lambda elapsed: elapsed > 0.1 and writer.progress.state.is_over,
            lambda: writer.start(folder / "image", BYTES_PER_S),
        )
        assert writer.progress.state is SnapshotState.DONE, writer.progress
        found["facts"] |= {"entries": writer.progress.written_entries, "nbytes": writer.progress.written_nbytes}
        return found
    finally:
        writer.close()


def thread(host: Host, folder: Path, serve: Serve) -> dict[str, Any]:
    def image() -> Iterator[HostEntry]:
        while True:
            with host.lock:
                entry = host.index.next_of_snapshot()
            if entry is None:
                return
            yield entry
            with host.lock:
                host.index.unpin(entry)

    def begin() -> None:
        with host.lock:
            host.index.begin_snapshot()
        writer.start()

    writer = threading.Thread(target=lambda: write(host, image(), folder))
    found = serve(host, lambda elapsed: elapsed > 0.1 and not writer.is_alive(), begin)
    host.index.end_snapshot()
    return found


def fork(host: Host, folder: Path, serve: Serve) -> dict[str, Any]:
    """The child sees the memory as it was, and writes it with the code and the priority of ours."""
    child = 0

    def begin() -> None:
        nonlocal child
        if not (child := os.fork()):
            os.nice(NICENESS)
            write(host, iter(host.entries()), folder)
            os._exit(0)

    def is_over(elapsed: float) -> bool:
        if elapsed < 0.1:
            return False
        pid, status = os.waitpid(child, os.WNOHANG)
        assert status == 0, "the child could not write"
        return pid == child

    return serve(host, is_over, begin)


def write(host: Host, entries: Iterator[HostEntry], folder: Path) -> None:
    tier = DiskTier(folder, UNBOUNDED, 1, num_threads=1)
    pace = Pace(BYTES_PER_S, threading.Event())
    for entry in entries:
        pace.wait_for(entry.extent.nbytes)
        tier.write(*host.describe(entry))
    tier.close()


WINDOWS: dict[str, Callable[[Host, Path, Serve], dict[str, Any]]] = {
    "none": none,
    "ours": ours,
    "thread": thread,
    "fork": fork,
}


def measure(host: Host, name: str, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()
    time.sleep(1)
    try:
        serve = without_a_pause if name.startswith("busy-") else at_a_fixed_rate
        return WINDOWS[name.removeprefix("busy-")](host, folder, serve)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    kind, gib, out, *names = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    with suppress(
        PermissionError
    ):  # less of what else runs on the machine; whoever writes follows, as far behind as ever
        os.nice(-15)
    host = Host(kind, int(float(gib) * (1 << 30)))
    gc.collect()
    gc.freeze()
    gc.disable()
    arrays, facts = {}, []
    show = partial(np.format_float_positional, precision=2)
    for number, name in enumerate(names):
        found = measure(host, name, Path(out).with_suffix(".folder"))
        facts.append({"window": name, **found.pop("facts")})
        arrays |= {f"{number}.{key}": array for key, array in found.items()}
        top = ", ".join(show(1e3 * np.quantile(found["latencies"], q)) for q in (0.5, 0.99, 0.999, 1))
        print(f"{kind}, {gib} GiB, {name}: median, p99, p99.9, longest {top} ms; {facts[-1]}", flush=True)
    host.index.check()
    huge = sum(int(line.split()[1]) for line in Path("/proc/self/smaps").read_text().splitlines() if "AnonHuge" in line)
    about = {
        "memory": kind,
        "gib": float(gib),
        "entries": len(host.index),
        "huge_kib": huge,
        "nice": os.nice(0),
        "windows": facts,
    }
    np.savez(out, about=json.dumps(about), **arrays)


if __name__ == "__main__":
    main()
