"""Entries of the fake engine: each fills its extent of a real slab with a mark of its own, which only it has, except
for the order of its tokens, which follows from the mark.
"""

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from engine.fake_records import Entry
from vlcache_connector.store.base import Part
from vlcache_connector.store.slab import EntryLayout, Slab, SlabBytes
from vlcache_connector.types import Extent, num_ordered

_known: dict[bytes, Entry] = {}  # mark -> entry, of all engines: one may find what another left on disk


@dataclass
class FakeEntries:
    """What one rank keeps. The KV of an entry differs between ranks, its embedding does not."""

    rank: int
    slab: Slab
    _bytes: SlabBytes

    @classmethod
    def make(cls, rank: int, layout: EntryLayout, nbytes: int, slab_name: str) -> "FakeEntries":
        return cls(rank, Slab(nbytes, layout, slab_name), SlabBytes.find(layout, slab_name, ["self"]))

    def write(self, extent: Extent, entry: Entry, is_lost: bool) -> None:
        """`is_lost`: only its first half, as a write that fails does."""
        mark = self._mark(entry)
        _known[mark] = entry
        for number, part in enumerate(self._bytes.parts(extent, entry.kind, entry.num_tokens)):
            if not is_lost or number == 0:
                filled = _filled(part, mark, entry.num_tokens)
                part.buffer[:] = (
                    filled[: len(filled) // 2] + bytes(len(filled) - len(filled) // 2) if is_lost else filled
                )

    def read(self, extent: Extent, kind: str, num_tokens: int) -> Entry | None:
        """The entry whose mark fills the extent; None when it is not filled with one mark."""
        parts = self._bytes.parts(extent, kind, num_tokens)
        mark = bytes(parts[0].buffer[:_MARK_NBYTES])
        entry = _known.get(mark)
        for part in parts:
            if bytes(part.buffer) != _filled(part, mark, num_tokens):
                return None
        return entry if entry is not None and self._mark(entry) == mark else None

    def order(self, entry: Entry) -> Sequence[int]:
        """What a KV entry says of its tokens, different on each rank."""
        return _order(self._mark(entry), entry.num_tokens)

    def _mark(self, entry: Entry) -> bytes:
        text = f"{entry!r} {self.rank if entry.kind == 'kv' else ''}"
        return hashlib.sha256(text.encode()).digest()[:_MARK_NBYTES]


_MARK_NBYTES = 16


def _filled(part: Part, mark: bytes, num_tokens: int) -> bytes:
    if part.name == "order":
        return array("i", _order(mark, num_tokens)).tobytes()
    return (mark * (len(part.buffer) // len(mark) + 1))[: len(part.buffer)]


def _order(mark: bytes, num_tokens: int) -> Sequence[int]:
    return random.Random(mark).sample(range(num_tokens), num_ordered(num_tokens))
