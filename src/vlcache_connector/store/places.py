"""A list of all entries of an index that can be read piece by piece while entries come and go. Scheduler side."""

from typing import Generic, Protocol, TypeVar


class Placed(Protocol):
    place: int  # in the list; kept by `Places`


T = TypeVar("T", bound=Placed)


class Places(Generic[T]):
    """An entry that stays, stays at its place. So reading page after page, with other work in between, meets every
    entry that was there all the time, once.
    """

    def __init__(self) -> None:
        self._entries: list[T | None] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        """Where the last page ends. Grows only."""
        return len(self._entries)

    def page(self, start: int, count: int) -> list[T]:
        """Entries at places [start, start + count)."""
        return [entry for entry in self._entries[start : start + count] if entry is not None]

    def add(self, entry: T) -> None:
        if self._free:
            entry.place = self._free.pop()
            self._entries[entry.place] = entry
        else:
            entry.place = len(self._entries)
            self._entries.append(entry)

    def remove(self, entry: T) -> None:
        assert self._entries[entry.place] is entry, "the entry is not at its place"
        self._entries[entry.place] = None
        self._free.append(entry.place)
