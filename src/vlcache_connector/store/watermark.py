"""Which entries belong to a snapshot that is being written, and which of them are still to be written. Scheduler side.

READY entries hang in chains, linked through themselves, least recently used first. Beginning a snapshot gives the whole
chain another name (`_unwritten`), whatever its length; entries that become READY later go to another chain. Every call
below is O(1), also the end of a snapshot that was cancelled: joining chains does not walk them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlcache_connector.store.host import HostEntry


class Link:
    """A place in a chain. Without one, the two names are unset: use after removal is an `AttributeError`."""

    __slots__ = ("newer", "older")
    newer: Link
    older: Link


class _Chain:
    def __init__(self) -> None:
        self._ring = ring = Link()  # closes the chain: newer of it is the oldest entry, older of it the newest
        ring.newer = ring.older = ring

    def __iter__(self) -> Iterator[HostEntry]:
        link = self._ring.newer
        while link is not self._ring:
            yield cast("HostEntry", link)
            link = link.newer

    def oldest(self) -> HostEntry | None:
        link = self._ring.newer
        return None if link is self._ring else cast("HostEntry", link)

    def append(self, link: Link) -> None:
        _insert(link, self._ring.older, self._ring)

    def prepend(self, link: Link) -> None:
        _insert(link, self._ring, self._ring.newer)

    def take_over(self, other: _Chain) -> None:
        """Append all of another chain, which is empty afterwards."""
        ring, first, last = other._ring, other._ring.newer, other._ring.older
        if first is ring:
            return
        first.older, self._ring.older.newer = self._ring.older, first
        last.newer, self._ring.older = self._ring, last
        ring.newer = ring.older = ring


class Watermark:
    """READY entries, and how far a snapshot of them has come.

    The snapshot number in an entry says all: entries with an older number than the running snapshot's belong to it and
    are not written yet.
    """

    def __init__(self) -> None:
        self.num_ready = 0
        self.ready_nbytes = 0
        self.is_active = False
        self._number = 0
        self._unwritten = _Chain()
        self._written = _Chain()
        self._others = _Chain()  # all that is READY while no snapshot is active
        self._departed: deque[HostEntry] = deque()

    def arrived(self, entry: HostEntry) -> None:
        """The entry became READY."""
        entry.snapshot = self._number
        self._others.append(entry)
        self.num_ready += 1
        self.ready_nbytes += entry.extent.nbytes

    def used(self, entry: HostEntry) -> None:
        _remove(entry)
        (self._unwritten if self.awaits(entry) else self._others).append(entry)

    def left(self, entry: HostEntry) -> bool:
        """The entry is READY no more. True when its bytes must stay until the snapshot has them; it comes next then."""
        _remove(entry)
        self.num_ready -= 1
        self.ready_nbytes -= entry.extent.nbytes
        if is_needed := self.awaits(entry):
            self._departed.append(entry)
        return is_needed

    def awaits(self, entry: HostEntry) -> bool:
        """Whether the running snapshot has yet to write this entry, which is READY or leaving."""
        return self.is_active and entry.snapshot < self._number

    def hurry(self, entry: HostEntry) -> None:
        """Write this entry before others: room is wanted."""
        _remove(entry)
        self._unwritten.prepend(entry)

    def begin(self) -> None:
        assert not self.is_active
        self.is_active = True
        self._number += 1
        self._unwritten, self._others = self._others, self._unwritten  # the latter is empty

    def take(self) -> tuple[HostEntry, bool] | None:
        """The next entry to write, and whether it had left before. None when all were taken."""
        if self._departed:
            entry = self._departed.popleft()
            entry.snapshot = self._number
            return entry, True
        if (oldest := self._unwritten.oldest()) is None:
            return None
        _remove(oldest)
        oldest.snapshot = self._number
        self._written.append(oldest)
        return oldest, False

    def end(self) -> tuple[HostEntry, ...]:
        """The snapshot is over, complete or not. Returns what had left and was not taken."""
        assert self.is_active
        self.is_active = False
        departed = tuple(self._departed)
        self._departed.clear()
        for chain in (self._unwritten, self._others):  # written ones were the least recently used
            self._written.take_over(chain)
        self._written, self._others = self._others, self._written
        return departed

    def held(self) -> tuple[HostEntry, ...]:
        """Entries that left, and whose bytes stay."""
        return tuple(self._departed)

    def check(self, ready: set[HostEntry]) -> None:
        """Raise `AssertionError` unless the chains hold exactly these entries, each where it belongs."""
        chains = [tuple(chain) for chain in (self._unwritten, self._written, self._others)]
        linked = [entry for chain in chains for entry in chain]
        assert len(linked) == self.num_ready == len(ready) and set(linked) == ready, "the chains lost an entry"
        assert self.ready_nbytes == sum(entry.extent.nbytes for entry in ready), "bytes of entries were miscounted"
        assert all(self.awaits(entry) for entry in (*chains[0], *self._departed)), "the snapshot lost an entry"
        assert not any(self.awaits(entry) for chain in chains[1:] for entry in chain), "written, and to be written"
        assert self.is_active or not (chains[0] or chains[1] or self._departed), "a snapshot that is over holds entries"


def _insert(link: Link, older: Link, newer: Link) -> None:
    link.older, link.newer = older, newer
    older.newer = newer.older = link


def _remove(link: Link) -> None:
    link.older.newer, link.newer.older = link.newer, link.older
    del link.older, link.newer
