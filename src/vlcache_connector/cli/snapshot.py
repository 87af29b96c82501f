"""`vlcache snapshot`: an image of a running cache's host tier, written while it serves."""

import argparse
import json
import sys
from pathlib import Path

from vlcache_connector.cli.options import Subparsers, add_cache, byte_rate, cache_of
from vlcache_connector.cli.shown import number, size, watched
from vlcache_connector.store.control.protocol import CacheCommands, ControlError, Message


def add(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "snapshot",
        help="write an image of the host tier while the engine serves",
        description="Writes an image of the host tier to PATH, and waits for it. The engine writes it: an interrupted "
        "wait (Ctrl-C, a lost terminal) does not stop it, --cancel does, and leaves nothing half-written.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("path", nargs="?", type=Path, metavar="PATH", help="where to write, as the engine sees it")
    what.add_argument("--cancel", action="store_true", help="stop the snapshot that is being written")
    parser.add_argument("--bandwidth", type=byte_rate, metavar="RATE", help="bytes per second at most, such as 500M")
    parser.add_argument("--no-wait", action="store_true", help="return when it has begun")
    add_cache(parser, may_be_stopped=False)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    cache = cache_of(options)
    if options.cancel:
        if not cache.cancel_snapshot():
            raise ControlError("no snapshot is being written")
        return _show(options, {"cancelled": True}, "the snapshot was cancelled")
    path = options.path.absolute()
    if options.no_wait:
        next(cache.snapshot(path, options.bandwidth))
        return _show(options, {"path": str(path), "has_begun": True}, f"the engine is writing {path}")
    result = _wait(cache, path, options.bandwidth)
    speed = size(int(result["nbytes"] / max(result["seconds"], 1e-3)))
    entries = number(result["entries"], "entry", "entries")
    text = f"{result['path']}: {entries}, {size(result['nbytes'])} in {result['seconds']:.1f} s ({speed}/s)"
    return _show(options, result, text)


def _wait(cache: CacheCommands, path: Path, bandwidth: int | None) -> Message:
    messages = cache.snapshot(path, bandwidth)
    try:
        result: Message = watched(messages, "snapshot")
    except KeyboardInterrupt:
        print("\nthe engine goes on writing; vlcache snapshot --cancel stops it", file=sys.stderr)
        raise
    return result


def _show(options: argparse.Namespace, result: Message, text: str) -> int:
    print(json.dumps(result, indent=2) if options.json else text)
    return 0
