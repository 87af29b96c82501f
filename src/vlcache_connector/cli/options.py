"""Options that several subcommands share: which cache is meant, units of numbers, and what an engine is given."""

import argparse
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlcache_connector.cli.shown import age, number
from vlcache_connector.errors import OptionError
from vlcache_connector.store.control import folder
from vlcache_connector.store.control.client import RunningCache, discover
from vlcache_connector.store.control.protocol import CacheCommands, Message, NoCacheError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = argparse._SubParsersAction

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def add_cache(parser: argparse.ArgumentParser, may_be_stopped: bool = True) -> None:
    """Options that choose a cache, and `--json`."""
    group = parser.add_argument_group("which cache (default: the one that runs here)").add_mutually_exclusive_group()
    group.add_argument("--pid", type=int, help="process id of the engine")
    group.add_argument("--socket", type=Path, metavar="PATH", help="control socket of the engine, as its log names it")
    if may_be_stopped:
        group.add_argument("--disk", type=Path, metavar="FOLDER", help="a cache on disk, whether an engine runs or not")
    parser.add_argument("--json", action="store_true", help="for programs: one document")


def cache_of(options: argparse.Namespace) -> CacheCommands:
    """The cache that the options choose. Raises `NoCacheError` when that is none, or several."""
    if options.socket:
        return RunningCache(options.socket)
    if getattr(options, "disk", None):
        from vlcache_connector.store.commands import StoppedCommands

        return StoppedCommands(options.disk)
    found = discover()
    if options.pid is not None:
        found = [(cache, about) for cache, about in found if about.get("pid") == options.pid]
    if len(found) == 1:
        return found[0][0]
    if found:
        raise NoCacheError(f"several caches are running, choose one: {'; '.join(_offers(found))}")
    of_pid = "" if options.pid is None else f" of process {options.pid}"
    places = ", ".join(str(place) for place in folder.candidates())
    hint = "name its socket, as its log does, with --socket PATH; or give --disk FOLDER for one that is stopped"
    raise NoCacheError(f"no running cache{of_pid} was found in {places}; {hint}")


def byte_rate(text: str) -> int:
    """Bytes per second: a number with or without K, M, G (decimal) or KiB, MiB, GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?I?)B?(?:/S)?", text.strip().upper())
    value = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes per second; write 500M or 2GiB")
    return value


def at_least_zero(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not an object; write for example \'{{"dtype": "bfloat16"}}\'')
    return found


def check_connector(options: Mapping[str, Any], taken: Mapping[str, str]) -> None:
    """Raises `OptionError` now and not after minutes of starting; also for options that are `taken`, because the
    command's requests differ in them, with what to do instead.
    """
    from vlcache_connector.config import Options

    Options.parse(options)
    for name, instead in taken.items():
        if name in options:
            raise OptionError(f"--connector has {name!r}, which changes from request to request here; {instead}")


def _offers(found: list[tuple[RunningCache, Message]]) -> list[str]:
    """How to name each of several caches; two engines of one process have one process id."""
    pids = [about.get("pid") for _, about in found]
    offers = []
    for (cache, about), pid in zip(found, pids, strict=True):
        name = f"--pid {pid}" if pids.count(pid) == 1 else f"--socket {cache.path}"
        entries = sum(tier["entries"] or 0 for tier in about["tiers"])
        since = age(time.time() - about["started_s"])
        offers.append(f"{name} ({about['model']}, {number(entries, 'entry', 'entries')}, running for {since})")
    return offers
