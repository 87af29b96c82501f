"""`vlcache check`: whether the cache agrees with itself."""

import argparse
import json

from vlcache_connector.cli.options import Subparsers, add_cache, cache_of
from vlcache_connector.cli.shown import number, size, watched


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "check",
        help="compare the index of a cache with its bytes",
        description="Compares index and bytes. The exit status is 1 when there are problems.",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="read and verify all files; a running engine stands still while its index examines itself as a whole",
    )
    add_cache(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    result = watched(cache_of(options).check(options.deep), "check")
    problems = result["problems"]
    entries = number(result["entries"], "entry", "entries")
    if options.json:
        print(json.dumps(result, indent=2))
    elif problems:
        print("\n".join(problems))
        print(f"{number(len(problems), 'problem', 'problems')} in {entries}")
    else:
        print(f"all well: {entries}, {size(result['nbytes'])}")
    return int(bool(problems))
