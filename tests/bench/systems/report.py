"""Tables of the parts of `bench_systems`, and their plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import table
from bench.systems import plots
from bench.systems.laps import PARTS, PASS_PARTS, RECOMPUTE
from bench.systems.records import Record, Row, rows_of, spread


def sizes(found: Mapping[str, Any], folder: Path) -> None:
    rows = rows_of(Record(**record) for record in found["records"])
    print("\nTime to the first token against image tokens, engine side")
    _print(rows, "image tokens")
    for name, reason in found["refusals"].items():
        print(f"{name} does not run here: {reason}")
    for failure in found["failures"]:
        print(f"FAILED: {failure}")
    _print_left_out(found)
    plots.sizes(rows, folder / "bench_systems_sizes.png")


def zipf(found: Mapping[str, Any], folder: Path) -> None:
    runs = found["runs"]
    cells = []
    for num_pictures, clients in dict.fromkeys((run["num_pictures"], run["concurrency"]) for run in runs):
        pairs = _pairs([run for run in runs if (run["num_pictures"], run["concurrency"]) == (num_pictures, clients)])
        shares = spread([ours["reused_share"] for _, ours in pairs])
        row = [f"{num_pictures}", f"{clients}", f"{pairs[0][0]['num_requests']}", f"{shares.median:.0%}"]
        for key in ("requests_per_s", "first_p50_s", "first_p99_s"):
            row += [f"{spread([pair[side][key] for pair in pairs]).median:.3g}" for side in (0, 1)]
            row.append(str(spread([ours[key] / plain[key] for plain, ours in pairs])))
        cells.append(row)
    print("\nPopular and less popular pictures, one to three in a prompt behind fresh text; every run starts empty")
    header = ["pictures", "clients", "requests", "reused"]
    for what in ("requests/s", "p50 [s]", "p99 [s]"):
        header += [f"{what} plain", "ours", "ours/plain"]
    print(table(header, cells))
    _print_left_out(found)
    plots.zipf(runs, folder / "bench_systems_zipf.png")


def parts(found: Mapping[str, Any], folder: Path) -> None:
    hits = found["hits"]
    print("\nWhere the time of a hit goes: ms, medians of each part")
    header = ["part", *(f"{hit['num_tokens']}, {hit['variant']}" for hit in hits)]
    rows = [[part, *(f"{1e3 * hit['parts'][part]:.2f}" for hit in hits)] for part in PARTS]
    for part in PASS_PARTS:
        shares = [hit["pass"].get(part, 0.0) * hit["parts"][RECOMPUTE] for hit in hits]
        rows.append([f"of recompute: {part}", *(f"{1e3 * share:.2f}" for share in shares)])
    rows.append(["first token", *(f"{1e3 * hit['seconds']:.2f}" for hit in hits)])
    print(table(header, rows))
    _print_left_out(found)
    plots.parts(hits, folder / "bench_systems_parts.png")


def text(found: Mapping[str, Any], folder: Path) -> None:
    print(f"\nText, LMCache with its server (chunks of {found['chunk_tokens']} tokens): a client's time to first token")
    _print(rows_of(Record(**record) for record in found["records"]), "text tokens")
    _print_left_out(found)


def _pairs(runs: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Plain and ours of each repeat."""
    by_mode = {mode: {run["repeat"]: run for run in runs if run["mode"] == mode} for mode in ("off", "reuse")}
    return [(plain, by_mode["reuse"][repeat]) for repeat, plain in by_mode["off"].items()]


def _print(rows: Sequence[Row], size: str) -> None:
    cells = [
        [
            row.system,
            row.variant,
            f"{row.num_tokens}",
            f"{1e3 * row.seconds.median:.0f}",
            f"{row.plain_over}",
            f"{row.over_exact}",
            f"{row.seconds.count}",
        ]
        for row in sorted(rows, key=lambda row: row.num_tokens)
    ]
    print("Ratios within a repeat: median [lowest-highest]")
    print(table(["system", "variant", size, "ms", "plain over this", "this over exact hit", "repeats"], cells))


def _print_left_out(found: Mapping[str, Any]) -> None:
    if found["left_out"]:
        print(f"left out, no time: {'; '.join(found['left_out'])}")
    print()
