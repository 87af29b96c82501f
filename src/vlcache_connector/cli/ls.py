"""`vlcache ls`: what is in the cache."""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

from vlcache_connector.cli.options import Subparsers, add_cache, at_least_zero, cache_of
from vlcache_connector.cli.shown import ABSENT, age, number, size, table
from vlcache_connector.store.control.protocol import SORTS, Message

_TITLES = ("TIER", "KEY", "KIND", "MODALITY", "TENANT", "TOKENS", "SIZE", "USES", "USED", "AGE", "")
_NUMBERS = frozenset({"TOKENS", "SIZE", "USES", "USED", "AGE"})


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "ls",
        help="list the entries of a cache",
        description="Lists entries, newest first, and sums by tier and kind. USED and AGE say how long ago.",
    )
    parser.add_argument(
        "--limit", type=at_least_zero, default=50, metavar="N", help="entries to list; 0: all (default: %(default)s)"
    )
    parser.add_argument(
        "--sort", choices=tuple(SORTS), default="new", help="largest or latest first (default: %(default)s)"
    )
    add_cache(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    cache = cache_of(options)
    about = cache.about()
    entries: list[Message] = []
    result: Message = {}
    for message in cache.list_entries(options.limit, options.sort):
        if "entry" in message:
            entries.append(message["entry"])
        result = message.get("result", result)
    entries.sort(key=lambda entry: _order(entry, options.sort), reverse=True)
    entries = entries[: options.limit or None]
    if options.json:
        print(json.dumps({"cache": about, "entries": entries, "totals": result["totals"]}, indent=2))
    else:
        for line in _lines(about, entries, result["totals"]):
            print(line)
    return 0


def _order(entry: Message, sort: str) -> float:
    values = (entry[name] for name in SORTS[sort])
    return next((value for value in values if value is not None), 0)


def _lines(about: Message, entries: list[Message], totals: list[Message]) -> Iterator[str]:
    now = time.time()
    if entries:
        yield from table(_TITLES, [_cells(entry, now) for entry in entries], _NUMBERS)
        yield ""
    for tier in about["tiers"]:
        yield _sums(tier, [total for total in totals if total["tier"] == tier["name"]])
    num_entries = sum(total["entries"] for total in totals)
    if len(entries) < num_entries:
        yield f"{len(entries):,} of {num_entries:,} are listed; --limit 0 lists all"


def _cells(entry: Message, now: float) -> list[str]:
    return [
        entry["tier"],
        entry["key"][:16],
        *(entry[name] or ABSENT for name in ("kind", "modality", "tenant")),
        f"{entry['num_tokens']:,}",
        size(entry["nbytes"]),
        _or_absent(entry["uses"]),
        *(age(None if entry[name] is None else now - entry[name]) for name in ("used_s", "created_s")),
        "pinned" if entry["is_pinned"] else "",
    ]


def _sums(tier: Message, totals: list[Message]) -> str:
    used = size(tier["used_nbytes"])
    if tier["capacity_nbytes"] is not None:
        used += f" of {size(tier['capacity_nbytes'])}"
    line = f"{tier['name']}: {number(sum(t['entries'] for t in totals), 'entry', 'entries')}, {used}"
    kinds = (f"{t['entries']:,} {t['kind'] or 'of unknown kind'} ({size(t['nbytes'])})" for t in totals)
    return f"{line}: {', '.join(kinds)}" if totals else line


def _or_absent(value: Any) -> str:
    return ABSENT if value is None else f"{value:,}"
