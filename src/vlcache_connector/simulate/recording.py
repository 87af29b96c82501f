"""Reads a trace (see `store/trace.py`) into the look-ups to replay. Trusts nothing in the file."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcache_connector.errors import VLCacheError
from vlcache_connector.store.trace import FORMAT, OPS
from vlcache_connector.types import EntryClass

_MAX_LINE = 4096  # characters
_MAX_NBYTES = 1 << 60


class TraceError(VLCacheError):
    """A file is no trace that can be replayed; the text names the line."""


@dataclass(slots=True)
class Lookup:
    """One request wanted one entry."""

    t: float  # seconds
    key: bytes
    nbytes: int
    seconds: float | None  # that a hit saves
    entry_class: EntryClass


@dataclass(frozen=True, slots=True)
class Recording:
    lookups: list[Lookup]
    capacity: int  # bytes, of the tier that was recorded

    @property
    def num_entries(self) -> int:
        return len({lookup.key for lookup in self.lookups})


def read(path: Path, progress: Callable[[float], None] = lambda share: None) -> Recording:
    """The look-ups of a trace; a look-up that has no price yet gets that of later ones. Raises `TraceError`."""
    try:
        with path.open("rb") as file:
            total = max(path.stat().st_size, 1)
            header = _parse(file.readline(_MAX_LINE), 1)
            if header.get("vlcache_trace") != FORMAT or not _is_size(header.get("capacity")):
                raise TraceError(f"line 1: not the header of a trace of format {FORMAT}")
            lookups, number, done = [], 1, 0
            while line := file.readline(_MAX_LINE):
                number, done = number + 1, done + len(line)
                event = _parse(line, number)
                lookup = _lookup_of(event, number)
                if event["op"] in ("hit", "miss"):
                    lookups.append(lookup)
                if number % 10_000 == 0:
                    progress(done / total)
    except OSError as error:
        raise TraceError(str(error)) from None
    if not lookups:
        raise TraceError("the trace holds no look-ups")
    _complete(lookups)
    return Recording(lookups, int(header["capacity"]))


def _parse(line: bytes, number: int) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise TraceError(f"line {number}: cut off, or longer than {_MAX_LINE} characters")
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        raise TraceError(f"line {number}: not JSON") from None
    if not isinstance(event, dict):
        raise TraceError(f"line {number}: not an object")
    return event


def _lookup_of(event: dict[str, Any], number: int) -> Lookup:
    valid: dict[str, Callable[[Any], bool]] = {
        "t": _is_amount,
        "op": lambda v: isinstance(v, str) and v in OPS,
        "key": lambda v: isinstance(v, str) and 0 < len(v) <= 64,
        "nbytes": _is_size,
        "seconds": lambda v: v is None or _is_amount(v),
        "class": lambda v: isinstance(v, list) and len(v) == 3 and all(isinstance(part, str) for part in v),
    }
    for name, is_valid in valid.items():
        if name not in event or not is_valid(event[name]):
            raise TraceError(f"line {number}: {name!r} is missing or not valid")
    seconds = event["seconds"]
    return Lookup(
        float(event["t"]),
        event["key"].encode(errors="surrogatepass"),
        event["nbytes"],
        None if seconds is None else float(seconds),
        EntryClass(*event["class"]),
    )


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15 and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_NBYTES


def _complete(lookups: list[Lookup]) -> None:
    """Prices that were unknown at first, by the mean of the kind; and one size per key, entries being immutable."""
    sums: dict[str, list[float]] = {}
    for lookup in lookups:
        if lookup.seconds is not None:
            total = sums.setdefault(lookup.entry_class.kind, [0.0, 0.0])
            total[0] += lookup.seconds
            total[1] += lookup.nbytes
    sizes: dict[bytes, int] = {}
    for lookup in lookups:
        lookup.nbytes = sizes.setdefault(lookup.key, lookup.nbytes)
        if lookup.seconds is None:
            seconds, nbytes = sums.get(lookup.entry_class.kind, (0.0, 1.0))
            lookup.seconds = seconds / nbytes * lookup.nbytes
