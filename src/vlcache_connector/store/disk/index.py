"""Which files the disk tier knows of, and which of them leave first. No I/O.

Look-ups may come from any thread at any time; changes are made under the catalog's lock. A record is replaced, never
altered, so a look-up sees the old or the new one.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from vlcache_connector.store.base import EntryMeta
from vlcache_connector.store.disk.folder import NUM_FOLDERS, FileName, Found
from vlcache_connector.store.eviction.order import EvictionOrder
from vlcache_connector.types import EntryClass


@dataclass(frozen=True, slots=True)
class Record:
    """The files of one entry."""

    key: bytes
    num_tokens: int
    entry_class: EntryClass
    world_size: int
    ranks: int  # bit r stands for the file of rank r
    nbytes: int  # of all files together
    written: int = field(compare=False)  # when, in nanoseconds of the wall clock
    expires_s: float = field(default=math.inf, compare=False)  # on the monotonic clock of the eviction order

    @property
    def is_complete(self) -> bool:
        return self.ranks == (1 << self.world_size) - 1

    @property
    def meta(self) -> EntryMeta:
        return EntryMeta(self.key, self.num_tokens, self.entry_class)

    def file_names(self) -> Iterator[FileName]:
        for rank in range(self.world_size):
            if self.ranks >> rank & 1:
                yield FileName(self.key, self.num_tokens, self.entry_class, rank, self.world_size)


class DiskIndex:
    """Records by key, in one dictionary for each folder of files."""

    def __init__(self, order: EvictionOrder) -> None:
        self._folders: list[dict[bytes, Record]] = [{} for _ in range(NUM_FOLDERS)]
        self.order = order
        self.nbytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._folders))

    def get(self, key: bytes) -> Record | None:
        return self._folders[key[0]].get(key)

    def get_unexpired(self, key: bytes) -> Record | None:
        record = self.get(key)
        return None if record is None or record.expires_s <= self.order.clock() else record

    def folder(self, number: int) -> list[Record]:
        return list(self._folders[number].values())

    def records(self) -> Iterator[Record]:
        for number in range(NUM_FOLDERS):
            yield from self.folder(number)

    def touch(self, record: Record) -> None:
        """The entry was used, unless it has left in the meantime."""
        if self.get(record.key) is record:
            self.order.used(record.key)

    def put(self, record: Record) -> None:
        """Add a record, or take it in the place of the one with its key. Counts as a use."""
        self._forget(record.key)
        age_s = max(0.0, (time.time_ns() - record.written) / 1e9)
        expires_s = self.order.inserted(record.key, record.nbytes, record.entry_class, age_s=age_s)
        if expires_s < math.inf:
            record = replace(record, expires_s=expires_s)
        self._folders[record.key[0]][record.key] = record
        self.nbytes += record.nbytes

    def remove(self, record: Record) -> bool:
        """Returns False, and does nothing, when another record has taken its place, or none."""
        if self.get(record.key) is not record:
            return False
        self._forget(record.key)
        return True

    def leavers(self, nbytes: int, entry_class: EntryClass | None, room: int) -> Iterator[Record]:
        """Who leaves so that there is `room` left at most, and a new entry of this class is within its quotas: what has
        expired first. The caller removes them on the way.
        """
        yield from map(self._known, self.order.expired())
        if entry_class is not None:
            yield from map(self._known, self.order.quota_victims(nbytes, entry_class))
        for key in self.order.victims():
            if self.nbytes <= room:
                return
            yield self._known(key)

    def _known(self, key: bytes) -> Record:
        record = self.get(key)
        assert record is not None, "the order of eviction holds a key that the index does not"
        return record

    def take_over(self, numbers: Iterable[int], listing: Iterable[Found]) -> list[Record]:
        """Make the records of some folders agree with a listing of these. What is new counts as used, oldest first.

        Returns the records that lack files.
        """
        listed = records_of(listing)
        for number in numbers:
            for record in self.folder(number):
                if record.key not in listed:
                    self.remove(record)
        for record in listed.values():
            if self.get(record.key) != record:
                self.put(record)
        return [record for key in listed if (record := self._folders[key[0]][key]) and not record.is_complete]

    def _forget(self, key: bytes) -> None:
        record = self._folders[key[0]].pop(key, None)
        if record is not None:
            self.nbytes -= record.nbytes
            self.order.removed(key)


def records_of(listing: Iterable[Found]) -> dict[bytes, Record]:
    """One record for each key, those used longest ago first.

    Two files of one key that disagree about the entry cannot both be right: the last one counts.
    """
    records: dict[bytes, Record] = {}
    for name, nbytes, _, written, _ in sorted(listing, key=lambda found: found.used):
        key, num_tokens, entry_class, rank, world_size = name
        known = records.pop(key, None)
        ranks = 1 << rank
        if known is not None and (known.num_tokens, known.entry_class, known.world_size) == name[1:3] + name[4:]:
            ranks, nbytes = ranks | known.ranks, nbytes + known.nbytes
        records[key] = Record(key, num_tokens, entry_class, world_size, ranks, nbytes, written)
    return records
