"""The disk tier: a folder of files that survives a restart, and that several engines may share.

Runs in the scheduler process: `find` on the scheduler's path, the rest in I/O threads. What another engine deleted is a
miss; what another engine wrote is found after the next `refresh`.
"""

import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from vlcache_connector.store.base import EntryLostError, EntryMeta, Part
from vlcache_connector.store.disk import check as disk_check
from vlcache_connector.store.disk import entry_file
from vlcache_connector.store.disk import folder as disk_folder
from vlcache_connector.store.disk.catalog import GONE, DiskCatalog
from vlcache_connector.store.disk.entry_file import Shard
from vlcache_connector.store.disk.folder import FileName, TemporaryFile
from vlcache_connector.store.disk.index import Record
from vlcache_connector.store.disk.workers import Workers
from vlcache_connector.store.eviction.limits import Limits
from vlcache_connector.store.eviction.policies import LRU, EvictionPolicy

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, so its handlers and level apply

NO_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # says nothing about the file


class DiskTier:
    """Entries in files under `root`, bounded by bytes. A `Tier`.

    KV entries have a file for each of `world_size` ranks; an embedding, of which all ranks have the same, has one.
    """

    name = "disk"

    def __init__(
        self,
        root: Path,
        capacity_nbytes: int,
        world_size: int,
        policy: EvictionPolicy | None = None,
        limits: Limits | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Lists what is there. Raises `OSError` when there is no folder and it cannot be made."""
        self._world_size = world_size
        self._catalog = DiskCatalog(root, capacity_nbytes, policy or LRU(), limits)
        self._workers = Workers(num_threads)

    def __len__(self) -> int:
        """Entries in the folder, also those of engines with another number of ranks."""
        return len(self._catalog.index)

    @property
    def nbytes(self) -> int:
        """Of the files of all these entries."""
        return self._catalog.index.nbytes

    @property
    def capacity_nbytes(self) -> int:
        return self._catalog.capacity_nbytes

    @property
    def root(self) -> Path:
        return self._catalog.root

    @property
    def evictions(self) -> int:
        return self._catalog.evictions

    def find(self, key: bytes) -> int | None:
        record = self._catalog.index.get_unexpired(key)
        return record.num_tokens if record is not None and self._is_ours(record) else None

    def entries(self) -> Iterator[EntryMeta]:
        """Without provenance."""
        return (record.meta for record in self._catalog.index.records() if self._is_ours(record))

    def read(self, meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> None:
        record = self._catalog.index.get(meta.key)
        if record is None or not record.is_complete:
            raise EntryLostError(f"entry {meta.key.hex()} is not on disk")
        try:
            self._read(record, meta, ranks)
        except EntryLostError as error:
            self._lose(record, str(error))
            raise EntryLostError(f"entry {meta.key.hex()} on disk is of no use: {error}") from error
        except OSError as error:
            if error.errno in NO_MEANS:
                self._catalog.overlook(record)
            elif error.errno in GONE:
                self._catalog.lose(record)
            else:
                self._lose(record, f"it cannot be read ({error.strerror})")
            raise EntryLostError(f"entry {meta.key.hex()} cannot be read from disk: {error.strerror}") from error
        self._catalog.touch(record)

    def write(self, meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> None:
        """Takes room from the entries that were not used for longest. On the disk for good when it returns."""
        world_size = len(ranks)
        headers = [entry_file.header_of(meta, rank, world_size, parts) for rank, parts in enumerate(ranks)]
        nbytes = sum(map(entry_file.file_nbytes, headers))
        record = Record(
            meta.key, meta.num_tokens, meta.entry_class, world_size, (1 << world_size) - 1, nbytes, time.time_ns()
        )
        with self._catalog.room_for(nbytes, meta.entry_class), ExitStack() as stack:
            files = [stack.enter_context(closing(TemporaryFile(self._catalog.root))) for _ in headers]
            shares = zip(files, headers, ranks, strict=True)
            shards = [Shard(file.fd, header, parts) for file, header, parts in shares]
            entry_file.write(shards, self._workers)
            self._catalog.place(record, files)
        try:
            disk_folder.sync_folder(self._catalog.path(next(record.file_names())).parent)
        except OSError:
            self._catalog.lose(record)
            raise

    def refresh(self) -> None:
        """Learn what other engines did in the folder. Cheap when they did nothing; raises nothing."""
        self._catalog.refresh()

    def clear(self) -> int:
        return self._catalog.clear()

    def check(self, *, deep: bool = False) -> list[str]:
        """`deep` also reads and verifies all files. Entries come and go meanwhile without being reported."""
        problems = list(self._catalog.problems())
        if deep:
            names = (name for record in self._catalog.index.records() for name in record.file_names())
            found = (disk_check.file_problem(self._catalog.path(name), name) for name in names)
            problems += [problem for problem in found if problem is not None]
        return problems

    def close(self) -> None:
        self._workers.close()

    def _is_ours(self, record: Record) -> bool:
        """Whether this engine can use an entry."""
        return record.is_complete and record.world_size == (self._world_size if record.entry_class.kind == "kv" else 1)

    def _read(self, record: Record, meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> None:
        """Raises `EntryLostError`, or `OSError`."""
        if (record.num_tokens, record.entry_class, record.world_size) != (
            meta.num_tokens,
            meta.entry_class,
            len(ranks),
        ):
            raise EntryLostError("it has another number of tokens or of ranks, or is of another class")
        with ExitStack() as stack:
            shards = []
            for name, parts in zip(record.file_names(), ranks, strict=True):
                fd = stack.enter_context(disk_folder.opened(self._catalog.path(name)))
                shards.append(Shard(fd, entry_file.header_of(meta, name.rank, name.world_size, parts), parts))
            entry_file.read(shards, self._workers)
            for shard in shards:
                with suppress(OSError):  # a read-only folder: the order of use does not survive a restart then
                    os.utime(shard.fd, ns=(time.time_ns(), os.fstat(shard.fd).st_mtime_ns))

    def _lose(self, record: Record, reason: str) -> None:
        if self._catalog.lose(record):
            name: FileName = next(record.file_names())
            logger.warning("Removed the disk cache file %s: %s. Its content will be computed again.", name, reason)
