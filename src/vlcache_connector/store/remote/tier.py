"""The remote tier: entries in a store that several engines share. Runs in the scheduler process.

`find` and `is_known` answer from memory; who wants to know more has an I/O thread `ask`. Bytes go through buffers of
the tier's own, are hashed in the same pass, and reach the host tier's memory only that way: an operation that was given
up may still write into its buffer.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from threading import Lock

from vlcache_connector.store.base import Count, EntryLostError, EntryMeta, Part
from vlcache_connector.store.control.protocol import ControlError
from vlcache_connector.store.remote.blob import BLOB_NBYTES, Blob, BlobKey, RankBlobs, first_blobs
from vlcache_connector.store.remote.link import Link, LinkError, NotConnectedError
from vlcache_connector.store.remote.presence import Presence

BLOBS_AT_ONCE = 8  # of one operation; each has the time-out to itself
_WRITE_TRIALS = 3
_ALIGNMENT = 64
_MAX_UNDELETED = 1000


class RemoteTier:
    """A `SharedTier` behind a `Link`, for engines of `world_size` ranks. An embedding is the same on all: kept once."""

    name = "remote"

    def __init__(self, link: Link, world_size: int, count: Count) -> None:
        self._link, self._world_size, self._count = link, world_size, count
        self._presence = Presence()
        self._undeleted: list[BlobKey] = []
        self._buffers = _Buffers(BLOBS_AT_ONCE * BLOB_NBYTES)

    @property
    def is_given_up(self) -> bool:
        return self._link.is_given_up

    def find(self, key: bytes) -> int | None:
        meta = None if self._link.is_given_up else self._presence.find(key)
        return meta.num_tokens if meta is not None else None

    def is_known(self, key: bytes) -> bool:
        return self._link.is_given_up or self._presence.is_known(key)

    def ask(self, metas: Sequence[EntryMeta]) -> None:
        firsts = [first_blobs(meta, self._ranks_of(meta)) for meta in metas]
        keys = [key for first in firsts for key in first]
        try:
            found = iter(self._link.run(lambda adapter: adapter.present(keys)))
        except LinkError:  # said and counted there
            found = iter([False] * len(keys))
        for meta, first in zip(metas, firsts, strict=True):
            is_there = list(islice(found, len(first))) == [True] * len(first)
            if is_there:
                self._presence.held(meta)
            else:
                self._presence.missing(meta.key)
            self._count("asked_entries", 1, f"{self.name}_{'hit' if is_there else 'miss'}")

    def read(self, meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> None:
        shares = _shares(meta, ranks)
        blobs = [(share, blob) for share in shares for blob in share.blobs]
        keys = [blob.key for _, blob in blobs]
        try:
            # lmcache waits in vain for what is not there, and blobs of an entry can be evicted one by one.
            if not all(self._link.run(lambda adapter: adapter.present(keys))):
                raise EntryLostError("it is gone, or a part of it is")
            self._fill(blobs, shares)
        except (EntryLostError, LinkError) as error:
            self._presence.missing(meta.key)
            raise EntryLostError(f"entry {meta.key.hex()} of the remote store is of no use: {error}") from error
        self._presence.held(meta)

    def _fill(self, blobs: Sequence[tuple[RankBlobs, Blob]], shares: Sequence[RankBlobs]) -> None:
        """What is damaged is removed: it would be found again and again."""
        try:
            for first in range(0, len(blobs), BLOBS_AT_ONCE):
                self._load(blobs[first : first + BLOBS_AT_ONCE])
            for share in shares:
                share.verify()
        except NotConnectedError:
            raise
        except (EntryLostError, LinkError):
            self._delete([blob.key for _, blob in blobs])
            raise

    def write(self, meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> None:
        """The first blobs last: see `blob`. Tried again some times when the store takes one not."""
        shares = _shares(meta, ranks)
        blobs = [(share, blob) for share in shares for blob in share.blobs]
        blobs.sort(key=lambda pair: pair[1].key.number == 0)
        for first in range(0, len(blobs), BLOBS_AT_ONCE):
            self._store(blobs[first : first + BLOBS_AT_ONCE])
        self._presence.held(meta)

    def entries(self) -> Iterator[EntryMeta]:
        """What this engine has written or found lately: the store cannot be listed."""
        return self._presence.entries()

    def refresh(self) -> None:
        self._link.probe()
        self._presence.prune()
        if self._undeleted and not self._link.is_given_up:
            keys, self._undeleted = self._undeleted, []
            self._delete(keys)

    def clear(self) -> int:
        """Removes what this engine knows of, as far as the store can delete: the first blobs, without which nothing is
        found. Raises `ControlError` when the store does not do it.
        """
        known = list(self._presence.entries())
        self._presence.clear()
        keys = [key for meta in known for key in first_blobs(meta, self._ranks_of(meta))]
        try:
            if keys:
                self._link.run(lambda adapter: adapter.delete(keys))
        except LinkError as error:
            raise ControlError(str(error)) from error
        return len(known)

    def check(self) -> list[str]:
        return [f"the store does not answer: {self._link.reason}"] if self._link.is_given_up else []

    def close(self) -> None:
        self._link.close()

    def _ranks_of(self, meta: EntryMeta) -> int:
        return self._world_size if meta.entry_class.kind == "kv" else 1

    def _load(self, blobs: Sequence[tuple[RankBlobs, Blob]]) -> None:
        keys = [blob.key for _, blob in blobs]
        with self._buffers.of([blob.nbytes for _, blob in blobs]) as values:
            self._link.run(lambda adapter: adapter.load(keys, values))
            for (share, blob), value in zip(blobs, values, strict=True):
                share.take(blob, value)

    def _store(self, blobs: Sequence[tuple[RankBlobs, Blob]]) -> None:
        keys = [blob.key for _, blob in blobs]
        with self._buffers.of([blob.nbytes for _, blob in blobs]) as values:
            for (share, blob), value in zip(blobs, values, strict=True):
                share.fill(blob, value)
            self._link.run(lambda adapter: adapter.store(keys, values), _WRITE_TRIALS)

    def _delete(self, keys: list[BlobKey]) -> None:
        """Now, or when the store answers again: lmcache may have waited for a value that it does not understand."""
        try:
            self._link.run(lambda adapter: adapter.delete(keys), num_trials=1)
        except LinkError:
            self._undeleted = [*self._undeleted, *keys][:_MAX_UNDELETED]


class _Buffers:
    """Memory for values on their way, used again and again. Each use has `nbytes` at most."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes + BLOBS_AT_ONCE * _ALIGNMENT
        self._free: list[mmap.mmap] = []
        self._lock = Lock()

    @contextmanager
    def of(self, sizes: Sequence[int]) -> Iterator[list[memoryview]]:
        """A buffer of each size. They are not used again when the use fails: somebody may still write to them."""
        with self._lock:
            memory = self._free.pop() if self._free else mmap.mmap(-1, self._nbytes)
        whole, start, buffers = memoryview(memory), 0, []
        for size in sizes:
            buffers.append(whole[start : start + size])
            start += -(-size // _ALIGNMENT) * _ALIGNMENT
        yield buffers
        with self._lock:
            self._free.append(memory)


def _shares(meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> list[RankBlobs]:
    return [RankBlobs(meta, rank, len(ranks), parts) for rank, parts in enumerate(ranks)]
