"""The host tier's index: which entries exist, where in the slab they lie, and who is using them. Scheduler side, no
torch.

States of an entry:   WRITING --commit--> READY --evict/clear--> gone        WRITING --discard--> gone

An entry that is gone keeps its bytes until the last pin is released, so a worker never reads or writes bytes that were
given to another entry. Look-ups see READY entries only. Entries are immutable once READY.
"""

from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise

from vlcache_connector.store.eviction import EvictionPolicy
from vlcache_connector.store.extents import ExtentAllocator
from vlcache_connector.types import Extent


class State(Enum):
    WRITING = auto()
    READY = auto()
    GONE = auto()


@dataclass(slots=True, eq=False)
class HostEntry:
    """One stored item. `num_tokens` rows of KV, or of an encoder embedding, at `extent` of every worker's slab."""

    key: bytes
    extent: Extent
    num_tokens: int
    state: State = State.WRITING
    pins: int = 1  # the writer's


class HostIndex:
    """Entries of the host tier, bounded by the slab's size."""

    def __init__(self, capacity_nbytes: int, eviction: EvictionPolicy) -> None:
        self._extents = ExtentAllocator(capacity_nbytes)
        self._eviction = eviction
        self._entries: dict[bytes, HostEntry] = {}
        self._pinned: dict[HostEntry, None] = {}  # entries that must keep their bytes, also those that are gone
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> HostEntry | None:
        """The entry, when it can be loaded. Does not count as a use."""
        entry = self._entries.get(key)
        return entry if entry is not None and entry.state is State.READY else None

    def holds(self, key: bytes) -> bool:
        """Whether the entry is there or being written: nothing is to be saved."""
        return key in self._entries

    def reserve(self, key: bytes, nbytes: int, num_tokens: int) -> HostEntry | None:
        """Room for a new entry, pinned for its writer, evicting others as needed. None when it cannot fit now."""
        assert key not in self._entries, "an entry is written once"
        extent = self._allocate(nbytes)
        if extent is None:
            return None
        entry = self._entries[key] = HostEntry(key, extent, num_tokens)
        self._pinned[entry] = None
        self._eviction.touched(key)
        return entry

    def commit(self, entry: HostEntry) -> None:
        """The writer is done: the entry can be found. A cleared entry stays gone."""
        assert entry.state is not State.READY
        if entry.state is State.WRITING:
            entry.state = State.READY
        self.unpin(entry)

    def discard(self, entry: HostEntry) -> None:
        """The writer failed: the entry never existed."""
        assert entry.state is not State.READY
        self._remove(entry)
        self.unpin(entry)

    def pin(self, entry: HostEntry) -> None:
        """Keep the entry's bytes in place; counts as a use."""
        assert entry.state is State.READY
        entry.pins += 1
        self._pinned[entry] = None
        self._eviction.touched(entry.key)

    def unpin(self, entry: HostEntry) -> None:
        assert entry.pins > 0, "unpinned more often than pinned"
        entry.pins -= 1
        if entry.pins == 0:
            del self._pinned[entry]
            if entry.state is State.GONE:
                self._extents.free(entry.extent)

    def clear(self) -> int:
        """Forget everything; returns how many entries that were."""
        entries = tuple(self._entries.values())
        for entry in entries:
            self._remove(entry)
        return len(entries)

    def check(self) -> None:
        """Raise `AssertionError` unless index, pins and free bytes agree with each other."""
        held = {*self._entries.values(), *self._pinned}
        edges = sorted((e.extent.offset, e.extent.offset + e.extent.nbytes) for e in held)
        assert all(a[1] <= b[0] for a, b in pairwise(edges)), "two entries share bytes"
        used = sum(end - start for start, end in edges)
        assert used + self._extents.num_free == self._extents.capacity, "bytes leaked"
        assert all(e.state is not State.GONE for e in self._entries.values()), "the index holds a removed entry"
        assert all(e.pins > 0 for e in self._entries.values() if e.state is State.WRITING), "a writer lost its pin"
        assert {e for e in held if e.pins > 0} == set(self._pinned), "pins and the list of pinned entries differ"

    def _allocate(self, nbytes: int) -> Extent | None:
        extent = self._extents.allocate(nbytes)
        if extent is not None or not self._could_fit(nbytes):
            return extent
        for key in self._eviction.victims():
            entry = self._entries[key]
            if entry.pins:
                continue
            self._remove(entry)
            self.evictions += 1
            if (extent := self._extents.allocate(nbytes)) is not None:
                return extent
        return None

    def _could_fit(self, nbytes: int) -> bool:
        """Whether evicting all that is not pinned would leave a free range of this size. Else nothing is evicted."""
        pinned = sorted((e.extent.offset, e.extent.offset + e.extent.nbytes) for e in self._pinned)
        edges = [(0, 0), *pinned, (self._extents.capacity, self._extents.capacity)]
        return any(after[0] - before[1] >= nbytes for before, after in pairwise(edges))

    def _remove(self, entry: HostEntry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._eviction.removed(entry.key)
        if entry.state is State.GONE:
            return
        entry.state = State.GONE
        if not entry.pins:
            self._extents.free(entry.extent)
