"""Allocator of byte ranges of one slab: first fit over a sorted free list, neighbours merged on free.

Scheduler side. Entries differ in size and a layer must be one contiguous copy, hence ranges and not pages.
"""

from bisect import bisect_left, insort

from vlcache_connector.types import Extent

ALIGNMENT = 256  # bytes; keeps every tensor view of an extent aligned for vector loads and for DMA


def aligned(nbytes: int) -> int:
    """Bytes that an extent for `nbytes` takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class ExtentAllocator:
    """Hands out disjoint extents of [0, capacity)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity - capacity % ALIGNMENT
        self._free = [(0, self.capacity)] if self.capacity > 0 else []  # (offset, nbytes), sorted by offset

    @property
    def num_free(self) -> int:
        """Free bytes, not necessarily contiguous."""
        return sum(nbytes for _, nbytes in self._free)

    def allocate(self, nbytes: int) -> Extent | None:
        """An extent of at least `nbytes` bytes, or None when no free range is large enough."""
        assert nbytes > 0
        size = aligned(nbytes)
        for i, (offset, free) in enumerate(self._free):
            if free >= size:
                if free == size:
                    del self._free[i]
                else:
                    self._free[i] = (offset + size, free - size)
                return Extent(offset, size)
        return None

    def free(self, extent: Extent) -> None:
        """Return an extent that `allocate` gave out."""
        start, end = extent.offset, extent.offset + extent.nbytes
        i = bisect_left(self._free, (start, 0))
        before = self._free[i - 1] if i else None
        after = self._free[i] if i < len(self._free) else None
        assert before is None or before[0] + before[1] <= start, f"{extent} was freed twice"
        assert after is None or end <= after[0], f"{extent} was freed twice"
        if after is not None and after[0] == end:
            end += after[1]
            del self._free[i]
        if before is not None and before[0] + before[1] == start:
            start = before[0]
            del self._free[i - 1]
        insort(self._free, (start, end - start))
