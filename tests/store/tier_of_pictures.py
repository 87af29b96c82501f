"""A small host tier with a slab that another process can map: what the tests of snapshots fill, change and compare.

python tests/store/tier_of_pictures.py TARGET      fills one and writes a slow snapshot of it, until it is killed
"""

import mmap
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from vlcache_connector.store.base import EntryMeta, Part
from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.host import HostEntry, HostIndex, SnapshotSize
from vlcache_connector.store.snapshot.restore import open_snapshot
from vlcache_connector.store.snapshot.wire import SharedSlab
from vlcache_connector.store.snapshot.writer import SnapshotWriter
from vlcache_connector.types import EntryClass

KV = EntryClass("kv", "image")
TOKEN = 1024  # bytes
NUM_LAYERS = 4
Image = dict[bytes, bytes]  # content by key


class RecordingIndex(HostIndex):
    """Says what was READY when the last snapshot began."""

    def __init__(self, nbytes: int, slab: memoryview) -> None:
        super().__init__(nbytes, LRU())
        self._slab = slab
        self.image: Image = {}

    def begin_snapshot(self) -> SnapshotSize:
        size = super().begin_snapshot()
        there = [entry for key in self._entries if (entry := self.get(key)) is not None]
        self.image = {
            entry.key: bytes(self._slab[entry.extent.offset :][: entry.num_tokens * TOKEN]) for entry in there
        }
        return size

    @property
    def num_pinned(self) -> int:
        return len(self._pinned)


class Pictures:
    """The tier. An entry of n tokens takes n KiB on each rank; its bytes tell its key and its version."""

    def __init__(self, nbytes: int, world_size: int = 1) -> None:
        self.slabs = [_slab(nbytes) for _ in range(world_size)]
        self.index = RecordingIndex(nbytes, self.slabs[0].view)
        self.lock = threading.RLock()
        self.versions = 0

    def insert(self, number: int, num_tokens: int) -> HostEntry | None:
        key = number.to_bytes(32)
        with self.lock:
            entry = None if self.index.holds(key) else self.index.reserve(key, num_tokens * TOKEN, num_tokens, KV)
        if entry is None:
            return None
        self.versions += 1
        content = b"%4d %6d %4d" % (number, self.versions, num_tokens)
        for rank, slab in enumerate(self.slabs):
            text = content + b"%d" % rank
            nbytes = num_tokens * TOKEN
            slab.view[entry.extent.offset :][:nbytes] = (text * (nbytes // len(text) + 1))[:nbytes]
        with self.lock:
            self.index.commit(entry)
        return entry

    def use(self, number: int) -> None:
        with self.lock:
            if (entry := self.index.get(number.to_bytes(32))) is not None:
                self.index.pin(entry)
                self.index.unpin(entry)

    def describe(self, entry: HostEntry) -> tuple[EntryMeta, list[list[Part]]]:
        meta = EntryMeta(entry.key, entry.num_tokens, KV, {"written by": "a test"})
        return meta, [parts_of(entry.num_tokens, slab.view[entry.extent.offset :]) for slab in self.slabs]

    def writer(self) -> SnapshotWriter:
        return SnapshotWriter(self.index, self.lock, self.describe, self.slabs)

    def check(self) -> None:
        """Nothing is held, nothing is lost."""
        with self.lock:
            self.index.check()
            assert self.index.num_pinned == 0


def parts_of(num_tokens: int, buffer: memoryview) -> list[Part]:
    nbytes = num_tokens * TOKEN // NUM_LAYERS
    return [Part(f"layer.{i}", "U8", (nbytes,), buffer[i * nbytes : (i + 1) * nbytes]) for i in range(NUM_LAYERS)]


def restored(target: Path, world_size: int = 1) -> Iterator[tuple[bytes, list[bytes]]]:
    """Keys and what each rank has of the entry, in the order of the snapshot."""
    saved = open_snapshot(target, world_size)
    for meta in saved.entries():
        content = [bytearray(meta.num_tokens * TOKEN) for _ in range(world_size)]
        saved.tier.read(meta, [parts_of(meta.num_tokens, memoryview(rank)) for rank in content])
        yield meta.key, [bytes(rank) for rank in content]
    saved.tier.close()


def image_at(target: Path) -> Image:
    return {key: ranks[0] for key, ranks in restored(target)}


def _slab(nbytes: int) -> SharedSlab:
    fd = os.memfd_create("slab")
    os.ftruncate(fd, nbytes)
    return SharedSlab(fd, memoryview(mmap.mmap(fd, nbytes, mmap.MAP_SHARED)))


if __name__ == "__main__":
    tier = Pictures(1 << 20)
    for number in range(64):
        tier.insert(number, 16)
    slow = tier.writer()
    slow.start(Path(sys.argv[1]), bytes_per_s=256 << 10)
    while not slow.progress.written_entries:
        slow.wait(0.01)
    sys.stdout.write(f"{slow.pid}\n")
    sys.stdout.flush()
    slow.wait()
