"""Tables of the part `targets` of `bench_systems`, and verdicts on all targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.interleaved import ratio
from bench.intervals import median
from bench.results import OUT, table
from bench.systems.cold import BEHIND, COLD, OFF
from bench.systems.growth import AGAIN, COPY, HIT
from bench.systems.lookups import CHAIN, KEYS, LOOKUP, PLAN, REQUEST
from bench.systems.records import PLAIN
from bench.systems.report import Content, print_left_out
from bench.systems.verdicts import growths, quantile_us, verdicts

TTFT = OUT / "bench_ttft.json"


def targets(content: Content) -> None:
    found = content["targets"]
    for name, show in (("cold", _cold), ("growth", _growth), ("lookups", _lookups)):
        if name in found:
            show(found[name])
    for failure in found["failures"]:
        print(f"FAILED: {failure}")
    ttft = json.loads(TTFT.read_text()) if TTFT.exists() else None
    print("\nTargets")
    rows = [[one.target, one.limit, one.found, one.word] for one in verdicts(content, ttft)]
    print(table(["target", "wanted", "found", ""], rows))
    for name in ("sizes", "targets"):
        if name in content and content[name]["circumstances"]["is_quick"]:
            print(f"careful: {name} is of a quick run, small and few")
    print_left_out(found)


def _cold(found: Mapping[str, Any]) -> None:
    rounds = found["rounds"]
    print(f"\nA new picture of {found['num_tokens']} tokens, and text right behind it: two engines beside each other,")
    print(f"ms, medians; over vLLM without a connector: median [95 % interval] (quartiles), {len(rounds)} rounds")
    rows = []
    for name, what in ((PLAIN, "vLLM without a connector"), (COLD, "ours, saving"), (OFF, "ours, mode off")):
        row = [what]
        for behind in ("", BEHIND):
            mine, plain = ([one[variant + behind] for one in rounds] for variant in (name, PLAIN))
            row.append(f"{1e3 * statistics.median(mine):.1f}")
            over = median([a / b for a, b in zip(mine, plain, strict=True)])
            quartiles = ratio(mine, plain)
            row.append(f"{over} ({quartiles.low:.2f}-{quartiles.high:.2f})" if name != PLAIN else "1")
        rows.append(row)
    print(table(["", "picture [ms]", "over plain", "text behind it [ms]", "over plain"], rows))
    print(f"the engine that was not asked was on the CPUs for {found['busy']:.1%} of the time at most")


def _growth(found: Mapping[str, Any]) -> None:
    sizes = found["sizes"]
    budget = f"at most {found['budget_tokens']} tokens of a picture recomputed"
    print(f"\nGrowth of a hit, {budget}, beside that of copying its KV: ms, medians")
    rows = []
    for row in sizes:
        copied = statistics.median(row["seconds"][COPY])
        times = [f"{1e3 * statistics.median(row['seconds'][name]):.1f}" for name in (HIT, AGAIN)]
        speed = f"{row['nbytes'] / copied / 1e9:.1f}"
        rows.append([f"{row['num_tokens']}", *times, f"{1e3 * copied:.2f}", speed, f"{row['nbytes'] / 1e6:.0f}"])
    header = ["image tokens", "hit", "again (vLLM's prefix cache)", "copy", "copy [GB/s]", "KV [MB]"]
    print(table(header, rows))
    print(f"\nGrowth from {sizes[0]['num_tokens']} tokens on [ms], and over that of the copy: median [95 % interval]")
    rows = [
        [
            f"{growth.num_tokens}",
            *(f"{1e3 * growth.median_s(name):.1f}" for name in (HIT, AGAIN, COPY)),
            *(f"{growth.ratio(name)}" for name in (HIT, AGAIN)),
        ]
        for growth in growths(found)
    ]
    print(table(["image tokens", "hit", "again", "copy", "hit / copy", "again / copy"], rows))
    print("\nWhere the growth of the hit is [ms]: differences of medians; of the pass, by its profiled shares")
    first, *others = sizes
    rows = [
        [part, *(f"{1e3 * (row['parts'][part] - seconds):.1f}" for row in others)]
        for part, seconds in first["parts"].items()
    ]
    print(table(["part", *(f"{row['num_tokens']}" for row in others)], rows))


def _lookups(found: Mapping[str, Any]) -> None:
    sizes = f"{found['num_entries']:,} entries, pictures of {found['num_tokens']} tokens"
    print(f"\nWhat a request costs the scheduler side, {sizes}: us, median / p99")
    parts = (KEYS, LOOKUP, PLAN, CHAIN, REQUEST)
    rows = [
        [
            case["case"],
            *(f"{statistics.median(us):.0f} / {quantile_us(us, 0.99):.0f}" for us in map(case["us"].get, parts)),
        ]
        for case in found["cases"]
    ]
    print(table(["request", *parts[:-1], "all of it"], rows))


def _middle_and_end(us: Sequence[float]) -> str:
    return f"{statistics.median(us):.0f} / {quantile_us(us, 0.99):.0f}"
