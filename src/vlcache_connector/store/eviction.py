"""Eviction policies of a bounded tier."""

from collections.abc import Iterator
from itertools import islice
from typing import Protocol


class EvictionPolicy(Protocol):
    """Decides the order in which entries leave. The tier tells it what happens; it only answers `victims`."""

    def touched(self, key: bytes) -> None:
        """The entry was inserted or used."""
        ...

    def removed(self, key: bytes) -> None:
        """The entry is gone."""
        ...

    def victims(self) -> Iterator[bytes]:
        """Keys in the order in which they should leave. The caller skips those that are pinned."""
        ...


class LRU:
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: dict[bytes, None] = {}  # a dict keeps insertion order: oldest first

    def touched(self, key: bytes) -> None:
        self._order.pop(key, None)
        self._order[key] = None

    def removed(self, key: bytes) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[bytes]:
        passed_over = 0  # keys that stayed; a few at a time, because the tier removes keys on the way
        while batch := tuple(islice(self._order, passed_over, passed_over + 32)):
            yield from batch
            passed_over += sum(key in self._order for key in batch)
