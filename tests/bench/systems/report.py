"""Tables of the parts of `bench_systems`. Each function takes the results of all parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.results import table
from bench.systems.laps import PARTS, PASS_PARTS, RECOMPUTE
from bench.systems.records import Record, Row, rows_of, spread

Content = Mapping[str, Any]
ZIPF_COLUMNS = (  # title, key of a run
    ("requests/s", "requests_per_s"),
    ("p50 [s]", "first_p50_s"),
    ("p90 [s]", "first_p90_s"),
    ("longest [s]", "first_longest_s"),
)


def records_of(rows: Sequence[Mapping[str, Any]]) -> list[Record]:
    return [Record(**row) for row in rows]


def sizes(content: Content) -> None:
    found = content["sizes"]
    print("\nTime to the first token against image tokens, engine side")
    _print(sorted(rows_of(records_of(found["records"])), key=lambda row: row.num_tokens), "image tokens")
    for name, reason in found["refusals"].items():
        print(f"{name} does not run here: {reason}")
    for failure in found["failures"]:
        print(f"FAILED: {failure}")
    print_left_out(found)


def mixed(content: Content) -> None:
    found = content["mixed"]
    print("\nSeveral known pictures, in a new order behind new text each time: time to the first token, engine side")
    _print_computed(found["orders"])
    print("\nA chat, one more known picture in each turn (plain: with vLLM's prefix cache); image tokens so far")
    _print_computed(found["turns"])
    print_left_out(found)


def zipf(content: Content) -> None:
    runs = content["zipf"]["runs"]
    loads = dict.fromkeys((run["num_pictures"], run["concurrency"]) for run in runs)
    pairs = {one: _pairs([run for run in runs if (run["num_pictures"], run["concurrency"]) == one]) for one in loads}
    print("\nPopular and less popular pictures, one to three in a prompt behind fresh text; every run starts empty")
    print("Time to the first token: its median, its 90th percentile, and the longest of a run's requests")
    for columns in (ZIPF_COLUMNS[:2], ZIPF_COLUMNS[2:]):
        header = ["pictures", "clients", "requests", "reused"]
        for what, _ in columns:
            header += [f"{what} plain", "ours", "ours/plain"]
        cells = []
        for (num_pictures, clients), of_load in pairs.items():
            share = spread([ours["reused_share"] for _, ours in of_load]).median
            row = [f"{num_pictures}", f"{clients}", f"{of_load[0][0]['num_requests']}", f"{share:.0%}"]
            for _, key in columns:
                row += [f"{spread([pair[side][key] for pair in of_load]).median:.3g}" for side in (0, 1)]
                row.append(str(spread([ours[key] / plain[key] for plain, ours in of_load])))
            cells.append(row)
        print(table(header, cells))
        print()
    print_left_out(content["zipf"])


def parts(content: Content) -> None:
    hits = content["parts"]["hits"]
    print("\nWhere the time of a hit goes: ms, medians of each part")
    header = ["part", *(f"{hit['num_tokens']}, {hit['variant']}" for hit in hits)]
    rows = [[part, *(f"{1e3 * hit['parts'][part]:.2f}" for hit in hits)] for part in PARTS]
    for part in PASS_PARTS:
        shares = [hit["pass"].get(part, 0.0) * hit["parts"][RECOMPUTE] for hit in hits]
        rows.append([f"of recompute: {part}", *(f"{1e3 * share:.2f}" for share in shares)])
    rows.append(["first token", *(f"{1e3 * hit['seconds']:.2f}" for hit in hits)])
    print(table(header, rows))
    print_left_out(content["parts"])


def text(content: Content) -> None:
    found = content["text"]
    print(f"\nText, LMCache with its server (chunks of {found['chunk_tokens']} tokens): a client's time to first token")
    _print(rows_of(records_of(found["records"])), "text tokens")
    print_left_out(found)


def _pairs(runs: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Plain and ours of each repeat."""
    by_mode = {mode: {run["repeat"]: run for run in runs if run["mode"] == mode} for mode in ("off", "reuse")}
    return [(plain, by_mode["reuse"][repeat]) for repeat, plain in by_mode["off"].items()]


def _print(rows: Sequence[Row], size: str, extra: Mapping[tuple[str, str], str] | None = None) -> None:
    """`extra`: tokens that each variant of each case computes."""
    header = ["system" if extra is None else "case", "variant", size, "ms", "plain over this", "this over exact hit"]
    cells = []
    for row in rows:
        tokens = [] if extra is None else [extra[row.system, row.variant]]
        ratios = [f"{row.plain_over}", f"{row.over_exact}"]
        times = [f"{1e3 * row.seconds.median:.0f}", *ratios, f"{row.seconds.count}"]
        cells.append([row.system, row.variant, f"{row.num_tokens}", *times, *tokens])
    print("Ratios within a repeat: median [lowest-highest]")
    print(table([*header, "repeats", *([] if extra is None else ["tokens computed"])], cells))


def _print_computed(found: Sequence[Mapping[str, Any]]) -> None:
    records = records_of(found)
    computed = {}
    for record in records:
        report = record.facts["accounting"]
        computed[record.system, record.variant] = f"{report['computed_tokens'] + report['recomputed_tokens']}"
    _print(rows_of(records), "image tokens", computed)


def print_left_out(found: Mapping[str, Any]) -> None:
    if found["left_out"]:
        print(f"left out, no time: {'; '.join(found['left_out'])}")
    print()
