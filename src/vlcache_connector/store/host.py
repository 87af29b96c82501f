"""The host tier's index: which entries exist, where in the slab they lie, and who is using them. Scheduler side, no
torch.

States of an entry:   WRITING --commit--> READY --evict/clear--> gone        WRITING --discard--> gone

An entry that is gone keeps its bytes until the last pin is released, so a worker never reads or writes bytes that were
given to another entry. Look-ups see READY entries only, and none whose time to live is over; those leave at the next
reservation. Entries are immutable once READY.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise

from vlcache_connector.errors import SnapshotError
from vlcache_connector.store.eviction.limits import Limits
from vlcache_connector.store.eviction.order import EvictionOrder
from vlcache_connector.store.eviction.policies import EvictionPolicy, Facts
from vlcache_connector.store.extents import ExtentAllocator, aligned
from vlcache_connector.store.places import Places
from vlcache_connector.store.watermark import Link, Watermark
from vlcache_connector.types import EntryClass, Extent

# While a snapshot is written, an insert passes over so many entries that the snapshot still needs, then gives up: the
# search stays short. Those entries are written next, so a moment later there is room.
MAX_HURRIED = 32


class State(Enum):
    WRITING = auto()
    READY = auto()
    GONE = auto()


@dataclass(slots=True, eq=False)
class HostEntry(Link):
    """One stored item. `num_tokens` rows of KV, or of an encoder embedding, at `extent` of every worker's slab."""

    key: bytes
    extent: Extent
    num_tokens: int
    entry_class: EntryClass
    expires_s: float = math.inf
    state: State = State.WRITING
    pins: int = 1  # the writer's
    place: int = -1  # in `places` of the index
    snapshot: int = 0  # see `Watermark`


@dataclass(frozen=True, slots=True)
class SnapshotSize:
    """What a snapshot will hold; bytes per worker."""

    num_entries: int
    nbytes: int


class HostIndex:
    """Entries of the host tier, bounded by the slab's size.

    `on_evicted` hears of each entry that is evicted, and why: for "room", by "quota", or because it has "expired".
    """

    def __init__(
        self,
        capacity_nbytes: int,
        policy: EvictionPolicy,
        limits: Limits | None = None,
        on_evicted: Callable[[HostEntry, str], None] = lambda entry, reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._extents = ExtentAllocator(capacity_nbytes)
        self._order = EvictionOrder(policy, self._extents.capacity, limits, clock)
        self._on_evicted = on_evicted
        self._entries: dict[bytes, HostEntry] = {}
        self._pinned: dict[HostEntry, None] = {}  # entries that must keep their bytes, also those that are gone
        self.places: Places[HostEntry] = Places()  # the same entries, in any state but GONE
        self._watermark = Watermark()
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> HostEntry | None:
        """The entry, when it can be loaded. Does not count as a use."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not State.READY:
            return None
        return entry if entry.expires_s == math.inf or not self._is_expired(entry) else None

    def get_found(self, key: bytes) -> HostEntry | None:
        """The entry that `get` has given in this step: its time may be over since then, but it has not left yet."""
        entry = self._entries.get(key)
        return entry if entry is not None and entry.state is State.READY else None

    def holds(self, key: bytes) -> bool:
        """Whether the entry is there or being written: nothing is to be saved."""
        entry = self._entries.get(key)
        return entry is not None and not self._is_expired(entry)

    @property
    def capacity_nbytes(self) -> int:
        return self._extents.capacity

    @property
    def free_nbytes(self) -> int:
        """Not necessarily in one piece."""
        return self._extents.num_free

    @property
    def used_nbytes(self) -> int:
        """Bytes of all entries, also of those that are gone and still pinned."""
        return self._extents.capacity - self._extents.num_free

    def facts(self, key: bytes) -> Facts | None:
        """What eviction knows of an entry; times are those of the monotonic clock."""
        return self._order.facts(key)

    def reserve(
        self, key: bytes, nbytes: int, num_tokens: int, entry_class: EntryClass, seconds: float | None = None
    ) -> HostEntry | None:
        """Room for a new entry, pinned for its writer, evicting others as needed. None when it cannot fit now.

        `seconds` is the engine time that a hit will save.
        """
        self._evict_expired(key)
        assert key not in self._entries, "an entry is written once"
        extent = self._allocate(nbytes, entry_class)
        if extent is None:
            return None
        expires_s = self._order.inserted(key, extent.nbytes, entry_class, seconds)
        entry = self._entries[key] = HostEntry(key, extent, num_tokens, entry_class, expires_s)
        self.places.add(entry)
        self._pinned[entry] = None
        return entry

    def commit(self, entry: HostEntry) -> None:
        """The writer is done: the entry can be found. A cleared entry stays gone."""
        assert entry.state is not State.READY
        if entry.state is State.WRITING:
            entry.state = State.READY
            self._watermark.arrived(entry)
        self.unpin(entry)

    def discard(self, entry: HostEntry) -> None:
        """The writer failed: the entry never existed."""
        assert entry.state is not State.READY
        self._remove(entry)
        self.unpin(entry)

    def pin(self, entry: HostEntry, is_use: bool = True) -> None:
        """Keep the entry's bytes in place; a use, unless the same request has used it already. An entry that is being
        written may be waited for.
        """
        assert entry.state is not State.GONE
        entry.pins += 1
        self._pinned[entry] = None
        if is_use:
            self._order.used(entry.key)
        if entry.state is State.READY:
            self._watermark.used(entry)

    def unpin(self, entry: HostEntry) -> None:
        assert entry.pins > 0, "unpinned more often than pinned"
        entry.pins -= 1
        if entry.pins == 0:
            del self._pinned[entry]
            if entry.state is State.GONE:
                self._extents.free(entry.extent)

    def has(self, entry: HostEntry) -> bool:
        """Whether this very entry is the one under its key, in whatever state."""
        return self._entries.get(entry.key) is entry

    def forget(self, entry: HostEntry) -> None:
        """The entry is not found any more; its bytes stay until the last pin is released."""
        self._remove(entry)

    def clear(self) -> int:
        """Forget everything; returns how many entries that were."""
        entries = tuple(self._entries.values())
        for entry in entries:
            self._remove(entry)
        return len(entries)

    def begin_snapshot(self) -> SnapshotSize:
        """From here on, `next_of_snapshot` yields all entries that are READY now, whatever happens to them. O(1).

        Raises `SnapshotError` while another one is being written.
        """
        if self._watermark.is_active:
            raise SnapshotError("a snapshot is being written already: wait until it is done, or cancel it")
        self._watermark.begin()
        return SnapshotSize(self._watermark.num_ready, self._watermark.ready_nbytes)

    def next_of_snapshot(self) -> HostEntry | None:
        """An entry of the snapshot that was not taken yet, pinned, the least recently used first. None at the end."""
        if (taken := self._watermark.take()) is None:
            return None
        entry, has_left = taken
        if not has_left:  # otherwise the pin of `_remove` is ours
            self._hold(entry)
        return entry

    def end_snapshot(self) -> None:
        """Done, or given up. Entries that were taken are unpinned by who took them."""
        for entry in self._watermark.end():
            self.unpin(entry)

    def check(self) -> None:
        """Raise `AssertionError` unless index, pins and free bytes agree with each other."""
        held = {*self._entries.values(), *self._pinned}
        edges = sorted((e.extent.offset, e.extent.offset + e.extent.nbytes) for e in held)
        assert all(a[1] <= b[0] for a, b in pairwise(edges)), "two entries share bytes"
        used = sum(end - start for start, end in edges)
        assert used + self._extents.num_free == self._extents.capacity, "bytes leaked"
        assert set(self.places.page(0, len(self.places))) == set(self._entries.values()), "places and entries differ"
        assert all(e.state is not State.GONE for e in self._entries.values()), "the index holds a removed entry"
        assert all(e.pins > 0 for e in self._entries.values() if e.state is State.WRITING), "a writer lost its pin"
        assert {e for e in held if e.pins > 0} == set(self._pinned), "pins and the list of pinned entries differ"
        present = sum(e.extent.nbytes for e in self._entries.values())
        assert (self._order.nbytes, len(self._order)) == (present, len(self)), "index and eviction order differ"
        self._watermark.check({e for e in self._entries.values() if e.state is State.READY})
        assert all(e.state is State.GONE and e.pins > 0 for e in self._watermark.held()), "the snapshot lost its pin"

    def _hold(self, entry: HostEntry) -> None:
        """A pin that is no use of the entry."""
        entry.pins += 1
        self._pinned[entry] = None

    def _allocate(self, nbytes: int, entry_class: EntryClass) -> Extent | None:
        size = aligned(nbytes)
        if not self._order.admits(size, entry_class, (e.key for e in self._pinned if e.state is not State.GONE)):
            return None
        extent = self._extents.allocate(nbytes)
        if extent is None and not self._could_fit(nbytes):
            return None
        for key in self._order.quota_victims(size, entry_class):
            self._evict(key, "quota")
        extent = extent or self._extents.allocate(nbytes)
        if extent is not None:
            return extent
        hurried = 0
        for key in self._order.victims():
            entry = self._entries[key]
            if not entry.pins and self._watermark.awaits(entry):  # its bytes could not be given away yet
                self._watermark.hurry(entry)
                if (hurried := hurried + 1) == MAX_HURRIED:
                    return None
            elif self._evict(key, "room") and (extent := self._extents.allocate(nbytes)) is not None:
                return extent
        return None

    def _evict_expired(self, wanted: bytes) -> None:
        """All whose time is over leave, except those that are pinned and are not in the way of a new entry."""
        for key in self._order.expired():
            self._evict(key, "expired", even_pinned=key == wanted)

    def _evict(self, key: bytes, reason: str, even_pinned: bool = False) -> bool:
        entry = self._entries[key]
        if entry.pins and not even_pinned:
            return False
        self._remove(entry)
        self.evictions += 1
        self._on_evicted(entry, reason)
        return True

    def _is_expired(self, entry: HostEntry) -> bool:
        return entry.expires_s <= self._order.clock()

    def _could_fit(self, nbytes: int) -> bool:
        """Whether evicting all that is not pinned would leave a free range of this size. Else nothing is evicted."""
        pinned = sorted((e.extent.offset, e.extent.offset + e.extent.nbytes) for e in self._pinned)
        edges = [(0, 0), *pinned, (self._extents.capacity, self._extents.capacity)]
        return any(after[0] - before[1] >= nbytes for before, after in pairwise(edges))

    def _remove(self, entry: HostEntry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._order.removed(entry.key)
        if entry.state is State.GONE:
            return
        if entry.state is State.READY and self._watermark.left(entry):
            self._hold(entry)
        entry.state = State.GONE
        self.places.remove(entry)
        if not entry.pins:
            self._extents.free(entry.extent)
