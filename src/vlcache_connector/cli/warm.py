"""`vlcache warm`: make images and videos known to a running server before somebody asks about them."""

import argparse
import json
import sys
from pathlib import Path

from vlcache_connector.cli.options import Subparsers
from vlcache_connector.cli.shown import number, watched


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "warm",
        help="make images and videos known to a running server ahead of time",
        description="Shows each image or video to a running server, alone, with one token of answer. What the server "
        "has not seen is computed and kept; what it knows is left as it is. A file that fails does not stop the "
        "others; the exit status is then 1.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="image and video files")
    parser.add_argument("--url", default="http://localhost:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="name of the model (default: the server's first)")
    parser.add_argument("--cache-salt", metavar="SALT", help="of the tenant who will ask (default: none)")
    parser.add_argument(
        "--parallel", type=_at_least_one, default=4, metavar="N", help="requests at a time (default: 4)"
    )
    parser.add_argument("--check", action="store_true", help="ask again at the end whether all are known")
    parser.add_argument("--json", action="store_true", help="for programs: one document")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Raises `ServerError` when there is no server, `FileNotFoundError` before anything is asked."""
    from vlcache_connector.warm import cache_at, warm

    for path in options.files:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
    files = list(dict.fromkeys(options.files))
    cache = cache_at(options.url.rstrip("/"), options.model, options.cache_salt)
    result = watched(warm(cache, files, options.parallel, options.check), "warm")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for file in result["files"]:
            if file["outcome"] == "failed":
                print(f"{file['path']}: {file['error']}", file=sys.stderr)
        counts = ", ".join(f"{result[kind]} {words}" for kind, words in _WORDS.items())
        print(f"{number(len(files), 'file', 'files')}: {counts}")
    return int(result["failed"] > 0)


_WORDS = {"computed": "computed", "known": "known before", "failed": "failed"}


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
