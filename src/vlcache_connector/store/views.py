"""Tiers as the command line sees them: rows to list, problems to report, bytes to give up. No torch.

The host tier's index belongs to the scheduler. Its lock is held for one page of entries at a time, and between pages
the interpreter is left to others, so that looking at a million entries is not felt by requests.
"""

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Protocol, TypeVar

from vlcache_connector.store.base import EntryMeta, Tier
from vlcache_connector.store.control.protocol import Message
from vlcache_connector.store.eviction.policies import Facts
from vlcache_connector.store.host import HostEntry, HostIndex, State
from vlcache_connector.types import EntryClass

T = TypeVar("T")

PAGE = 250  # entries at once: what they take is how long another thread may wait for the interpreter
_PAUSE_S = 0.0005  # between pages


@dataclass(frozen=True, slots=True)
class Row:
    """One entry of one tier. None is what the tier does not know."""

    tier: str
    key: bytes
    entry_class: EntryClass | None
    num_tokens: int
    nbytes: int | None = None
    uses: int | None = None
    created_s: float | None = None  # Unix time
    used_s: float | None = None
    is_pinned: bool | None = None

    def message(self) -> Message:
        known = self.entry_class
        return {
            "tier": self.tier,
            "key": self.key.hex(),
            "kind": known and known.kind,
            "modality": known and known.modality,
            "tenant": known and known.tenant,
            "num_tokens": self.num_tokens,
            "nbytes": self.nbytes,
            "uses": self.uses,
            "created_s": self.created_s,
            "used_s": self.used_s,
            "is_pinned": self.is_pinned,
        }


class View(Protocol):
    """A tier, looked at."""

    name: str

    def summary(self) -> Message:
        """`name`, `capacity_nbytes`, `used_nbytes`, `entries`."""
        ...

    def rows(self) -> Iterator[Row]: ...

    def problems(self, deep: bool) -> Iterator[str | None]:
        """A sentence for each problem; None for each bit of progress, about one per entry."""
        ...

    def clear(self) -> int: ...


class HostView:
    """The host tier of a running engine."""

    name = "host"

    def __init__(self, index: HostIndex, lock: threading.RLock) -> None:
        self._index = index
        self._lock = lock
        self._epoch_s = time.time() - time.monotonic()  # zero of the monotonic clock, as Unix time

    def summary(self) -> Message:
        with self._lock:
            return {
                "name": self.name,
                "capacity_nbytes": self._index.capacity_nbytes,
                "used_nbytes": self._index.used_nbytes,
                "entries": len(self._index),
            }

    def rows(self) -> Iterator[Row]:
        for page in self._pages():
            with self._lock:
                rows = [self._row(entry, self._index.facts(entry.key)) for entry in page if entry.state is State.READY]
            yield from rows

    def problems(self, deep: bool) -> Iterator[str | None]:
        """Entry by entry, while the engine goes on. Deep, the index examines itself as a whole: the engine waits."""
        seen: list[HostEntry] = []
        for page in self._pages():
            with self._lock:
                found = [problem for entry in page if (problem := self._problem_of(entry))]
            seen += page
            yield from found
            yield from (None for _ in page)
        yield from self._overlaps(seen)
        if deep:
            with self._lock:
                problem = self._self_check()
            if problem:
                yield problem

    def clear(self) -> int:
        removed = 0
        for page in self._pages():
            with self._lock:
                for entry in page:
                    if entry.state is not State.GONE:
                        self._index.forget(entry)
                        removed += 1
        return removed

    def _pages(self) -> Iterator[list[HostEntry]]:
        start, end = 0, len(self._index.places)
        while start < end:
            with self._lock:
                page = self._index.places.page(start, min(PAGE, end - start))
            yield page
            start += PAGE
            time.sleep(_PAUSE_S)

    def _row(self, entry: HostEntry, facts: Facts | None) -> Row:
        known = entry.entry_class, entry.num_tokens, entry.extent.nbytes
        if facts is None:  # it has just left
            return Row(self.name, entry.key, *known)
        created_s, used_s = self._epoch_s + facts.inserted_s, self._epoch_s + facts.used_s
        return Row(self.name, entry.key, *known, facts.num_uses - 1, created_s, used_s, entry.pins > 0)

    def _problem_of(self, entry: HostEntry) -> str | None:
        """What is wrong with one entry, under the lock."""
        if entry.state is State.GONE:
            return None
        extent = entry.extent
        if not self._index.has(entry):
            return f"host: entry {entry.key.hex()[:16]} is not the one that its key finds"
        if entry.state is State.WRITING and not entry.pins:
            return f"host: entry {entry.key.hex()[:16]} is being written by nobody"
        if extent.offset < 0 or extent.offset + extent.nbytes > self._index.capacity_nbytes:
            return f"host: entry {entry.key.hex()[:16]} lies outside of the memory"
        return None

    def _overlaps(self, seen: list[HostEntry]) -> Iterator[str]:
        """Neighbours that share bytes. All were seen before this; those that are still here now were here together."""
        in_order = sorted_in_pieces(seen, lambda entry: entry.extent.offset)
        for a, b in pairwise(entry for entry in in_order if entry.state is not State.GONE):
            if a.extent.offset + a.extent.nbytes > b.extent.offset:
                yield f"host: entries {a.key.hex()[:16]} and {b.key.hex()[:16]} share bytes"

    def _self_check(self) -> str | None:
        try:
            self._index.check()
        except AssertionError as error:
            return f"host: {error}"
        return None


class TierView:
    """A tier below the host tier, of a running engine or of a folder."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.name = tier.name

    def summary(self) -> Message:
        entries = sum(1 for _ in self._tier.entries())
        return {"name": self.name, "capacity_nbytes": None, "used_nbytes": None, "entries": entries}

    def rows(self) -> Iterator[Row]:
        yield from (self._row(meta) for meta in self._tier.entries())

    def problems(self, deep: bool) -> Iterator[str | None]:
        yield from (f"{self.name}: {problem}" for problem in self._tier.check())

    def clear(self) -> int:
        return self._tier.clear()

    def _row(self, meta: EntryMeta) -> Row:
        return Row(self.name, meta.key, meta.entry_class, meta.num_tokens)


def sorted_in_pieces(items: Iterable[T], key: Callable[[T], float]) -> Iterator[T]:
    """Like `sorted`, which would keep all other threads waiting for as long as it takes: a second for a million."""
    rest = iter(items)
    pieces = []
    while piece := sorted(islice(rest, PAGE), key=key):
        pieces.append(piece)
    return heapq.merge(*pieces, key=key)


def totals_of(counts: Counter[tuple[str, str | None, str]]) -> list[Message]:
    """Sums by tier and kind, of counts of (tier, kind, what)."""
    groups = dict.fromkeys((tier, kind) for tier, kind, _ in counts)
    sums = ("entries", "num_tokens", "nbytes")
    return [{"tier": t, "kind": k, **{name: counts[t, k, name] for name in sums}} for t, k in groups]
