"""`vlcache explain`: what a running server would reuse of a prompt."""

import argparse
import json
from pathlib import Path

from vlcache_connector.cli.options import Subparsers


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "explain",
        help="show what a running server would reuse of a prompt",
        description="Asks a running server a prompt (one token is generated) and shows the plan for it.",
    )
    parser.add_argument("parts", nargs="+", metavar="TEXT|FILE", help="texts, image and video files, in order")
    parser.add_argument("--url", default="http://localhost:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="name of the model (default: the server's first)")
    parser.add_argument("--recompute-ratio", type=float, help="instead of the server's own")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Raises `ServerError` when the server gives no answer."""
    from vlcache_connector.explain import ask, lines

    parts = [Path(part) if Path(part).is_file() else part for part in options.parts]
    report = ask(options.url.rstrip("/"), options.model, parts, options.recompute_ratio)
    print(json.dumps(report, indent=2) if options.json else "\n".join(lines(report)))
    return 0
