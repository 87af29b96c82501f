"""What a shared store is known to hold or to lack. Others write there and it evicts, so knowledge ages."""

import time
from collections.abc import Callable, Iterator

from vlcache_connector.store.base import EntryMeta

HELD_S = 60.0  # how long an entry that was seen is taken to be there; a wrong guess costs one read
MISSING_S = 5.0  # how long one that was not there is not asked for again
MAX_KEYS = 1 << 18


class Presence:
    """Looked into on the scheduler's path, changed by I/O threads: each method is a few dictionary operations."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[bytes, tuple[EntryMeta | None, float]] = {}  # key -> what is there, until when it counts

    def find(self, key: bytes) -> EntryMeta | None:
        meta, until_s = self._known.get(key, (None, 0.0))
        return meta if self._clock() < until_s else None

    def is_known(self, key: bytes) -> bool:
        """Whether the entry is known to be there or not to be there."""
        return key in self._known and self._clock() < self._known[key][1]

    def held(self, meta: EntryMeta) -> None:
        self._set(meta.key, meta, HELD_S)

    def missing(self, key: bytes) -> None:
        self._set(key, None, MISSING_S)

    def entries(self) -> Iterator[EntryMeta]:
        now = self._clock()
        return (meta for meta, until_s in list(self._known.values()) if meta is not None and now < until_s)

    def clear(self) -> None:
        self._known = {}

    def prune(self) -> None:
        """Drop what has aged, and what was learnt first when there is too much."""
        now, known = self._clock(), list(self._known.items())
        num_excess = len(known) - MAX_KEYS
        for i, (key, (_, until_s)) in enumerate(known):
            if i < num_excess or until_s <= now:
                self._known.pop(key, None)

    def _set(self, key: bytes, meta: EntryMeta | None, seconds: float) -> None:
        self._known.pop(key, None)  # so that it is the last one
        self._known[key] = (meta, self._clock() + seconds)
