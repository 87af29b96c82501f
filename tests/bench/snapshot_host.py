"""A full host tier and what is done to it: the part of `bench_snapshot` that is under traffic."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from vlcache_connector.store.base import EntryMeta, Part
from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.host import HostEntry, HostIndex
from vlcache_connector.types import EntryClass

SIZES = [256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20]  # bytes of an entry
NUM_PARTS = 32  # of an entry: layers
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 14, 15


class Memory:
    """The slab, all its pages present: `shared` (a memfd, as the engine has it), or private memory, `4k` or `huge`."""

    def __init__(self, kind: str, nbytes: int) -> None:
        self.fd = -1
        if kind == "shared":
            self.fd = os.memfd_create("slab")
            os.ftruncate(self.fd, nbytes)
            mapping = mmap.mmap(self.fd, nbytes, mmap.MAP_SHARED)
        else:
            mapping = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            mapping.madvise({"4k": _MADV_NOHUGEPAGE, "huge": _MADV_HUGEPAGE}[kind])
        self.view = memoryview(mapping)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        ctypes.memset(self.start, 1, nbytes)


class Host:
    """The tier; one thread serves it. Counts what it had to refuse and how long it waited for the index' lock."""

    def __init__(self, kind: str, nbytes: int) -> None:
        self.memory = Memory(kind, nbytes)
        self.index = HostIndex(nbytes, LRU())
        self.lock = threading.Lock()
        self.refused = 0
        self.waited_s = 0.0  # the longest time since this was set to 0
        self._random = random.Random(0)
        self._source = ctypes.create_string_buffer(np.random.default_rng(0).bytes(max(SIZES)), max(SIZES))
        self._number = 0
        while not self.index.evictions:
            self.insert()

    def insert(self) -> None:
        nbytes = self._random.choice(SIZES)
        with self._locked():
            entry = self.index.reserve(self._number.to_bytes(32), nbytes, nbytes >> 10)
        if entry is None:
            self.refused += 1
            return
        self._number += 1
        ctypes.memmove(self.memory.start + entry.extent.offset, self._source, nbytes)  # releases the interpreter lock
        with self._locked():
            self.index.commit(entry)

    def look_up(self) -> None:
        """Mostly of recent entries; a found one is pinned for a moment, as for a load."""
        age = int(self._random.expovariate(4 / len(self.index)))
        with self._locked():
            if (entry := self.index.get(max(0, self._number - 1 - age).to_bytes(32))) is not None:
                self.index.pin(entry)
                self.index.unpin(entry)

    def entries(self) -> list[HostEntry]:
        return [entry for i in range(self._number) if (entry := self.index.get(i.to_bytes(32))) is not None]

    def describe(self, entry: HostEntry) -> tuple[EntryMeta, list[list[Part]]]:
        start, nbytes = entry.extent.offset, (entry.num_tokens << 10) // NUM_PARTS
        view = self.memory.view
        parts = [
            Part(f"layer.{i}", "U8", (nbytes,), view[start + i * nbytes : start + (i + 1) * nbytes])
            for i in range(NUM_PARTS)
        ]
        return EntryMeta(entry.key, entry.num_tokens, EntryClass("kv", "image")), [parts]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        before = time.perf_counter()
        with self.lock:
            self.waited_s = max(self.waited_s, time.perf_counter() - before)
            yield
