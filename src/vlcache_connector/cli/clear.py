"""`vlcache clear`: remove entries."""

import argparse
import json
import sys

from vlcache_connector.cli.options import Subparsers, add_cache, cache_of
from vlcache_connector.cli.shown import number, size
from vlcache_connector.store.control.protocol import ControlError, Message


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "clear",
        help="remove all entries of a cache",
        description="Removes all entries, after asking. What requests are using stays until they are done with it; "
        "vLLM's own prefix cache is another matter.",
    )
    parser.add_argument("--tier", action="append", metavar="TIER", help="only this tier; may be repeated")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_cache(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    cache = cache_of(options)
    about = cache.about()
    tiers = {tier["name"]: tier for tier in about["tiers"]}
    chosen = list(dict.fromkeys(options.tier or tiers))
    for name in chosen:
        if name not in tiers:
            raise ControlError(f"there is no tier {name!r} in this cache; there are {', '.join(tiers)}")
    if not options.yes and not _agreed([tiers[name] for name in chosen]):
        print("nothing was removed", file=sys.stderr)
        return 1
    removed = cache.clear(chosen)
    if options.json:
        print(json.dumps({"removed": removed}, indent=2))
    else:
        print("removed " + ", ".join(f"{number(n, 'entry', 'entries')} of {name}" for name, n in removed.items()))
    return 0


def _agreed(tiers: list[Message]) -> bool:
    """Whether the person at the terminal says yes. Raises `ControlError` when there is none."""
    if not sys.stdin.isatty():
        raise ControlError("there is no terminal to ask at; give --yes to remove without being asked")
    shown = "; ".join(
        f"{tier['name']}: {number(tier['entries'], 'entry', 'entries')}, {size(tier['used_nbytes'])}" for tier in tiers
    )
    print(f"This removes {shown}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
