"""Moves entries between the host tier and the tiers below it, in threads of the scheduler process. They read and write
the workers' slabs, which are shared memory, so no engine step and no worker takes part.

`lock` guards the host index; the scheduler's hooks hold it while they run, threads here hold it for the few lines that
change the index, and nobody holds it during I/O.

Each tier has threads of its own, so that a slow one keeps nobody from the others. What a shared tier holds is learnt by
asking it (`ask`), in such a thread as well.

An entry on its way up (`fetch`) is being written as far as the index is concerned: nobody finds it before all its bytes
were read and verified. An entry on its way down (`keep`) is pinned. Both are bounded, and what does not fit is dropped:
the entry is computed again, or is gone after a restart.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from logging import getLogger

from vlcache_connector.metrics import Counters
from vlcache_connector.store.base import EntryLostError, EntryMeta, SharedTier, Tier
from vlcache_connector.store.host import HostEntry, HostIndex
from vlcache_connector.store.host_bytes import HostBytes
from vlcache_connector.types import EntryClass

logger = getLogger(f"vllm.{__name__}")

_READERS = 2
_MANY_MOVES = 8
_REFRESH_S = 5.0
_LAST_MOVES_S = 3.0  # how long an engine that ends waits for entries that are on their way


@dataclass(frozen=True, slots=True)
class Fetch:
    """An entry on its way up, and where it comes from."""

    entry: HostEntry
    tier: Tier


class _Threads:
    """Of one tier; none is started before it is needed."""

    def __init__(self, tier: str) -> None:
        self.readers = ThreadPoolExecutor(_READERS, f"vlcache-read-{tier}")
        self.writer = ThreadPoolExecutor(1, f"vlcache-write-{tier}")
        self.asker = ThreadPoolExecutor(1, f"vlcache-ask-{tier}")
        self.unwritten_nbytes = 0

    def shutdown(self) -> None:
        for pool in (self.readers, self.writer, self.asker):
            pool.shutdown(wait=False, cancel_futures=True)


class LowerTiers:
    """The tiers below the host tier, nearest first; there may be none. Methods are called with `lock` held, except
    `drain` and `close`.
    """

    def __init__(
        self,
        index: HostIndex,
        lock: threading.RLock,
        host_bytes: HostBytes,
        tiers: Sequence[Tier],
        counters: Counters,
        max_unwritten_nbytes: int,
    ) -> None:
        self.tiers = tuple(tiers)
        self._index, self._lock, self._bytes, self._counters = index, lock, host_bytes, counters
        self._max_unwritten_nbytes = max_unwritten_nbytes  # of all tiers together
        self._shared = [tier for tier in tiers if isinstance(tier, SharedTier)]
        self._asked: set[tuple[str, bytes]] = set()  # tier and key of each question without an answer yet
        self._fetching: dict[bytes, Fetch] = {}
        self._failing: set[str] = set()  # tiers whose last write failed
        self._is_closed = threading.Event()
        self._under_way: set[Future[None]] = set()
        self._threads: dict[str, _Threads] = {}  # by name of the tier
        if tiers:
            threading.Thread(target=self._refresh, name="vlcache-refresh", daemon=True).start()

    # -- asking -------------------------------------------------------------------------------------------------------

    def ask(self, wanted: Sequence[tuple[bytes, int, EntryClass]]) -> bool:
        """Begin to learn which of these entries (key, tokens, class) shared tiers hold, where only asking can tell;
        whether an answer is still out. None of them is in host memory.
        """
        if not self._shared:
            return False
        metas = {
            key: EntryMeta(key, num_tokens, entry_class)
            for key, num_tokens, entry_class in wanted
            if self.find(key, num_tokens) is None
        }
        is_out = False
        for tier in self._shared:
            unknown = [meta for meta in metas.values() if not tier.is_known(meta.key)]
            unasked = [meta for meta in unknown if (tier.name, meta.key) not in self._asked]
            if unasked:
                self._asked.update((tier.name, meta.key) for meta in unasked)
                self._start(self._threads_of(tier).asker.submit(self._ask, tier, unasked))
            is_out = is_out or bool(unknown)
        return is_out

    def _ask(self, tier: SharedTier, metas: Sequence[EntryMeta]) -> None:
        start = time.perf_counter()
        try:
            tier.ask(metas)
        finally:
            with self._lock:
                self._asked.difference_update((tier.name, meta.key) for meta in metas)
            self._counters.add("asked_seconds", time.perf_counter() - start, label=tier.name)

    # -- up -----------------------------------------------------------------------------------------------------------

    def find(self, key: bytes, num_tokens: int) -> Tier | None:
        """The nearest tier that holds the entry."""
        return next((tier for tier in self.tiers if tier.find(key) == num_tokens), None)

    def fetching(self, key: bytes) -> Fetch | None:
        """Whether the entry is on its way up, and was not cleared meanwhile."""
        fetch = self._fetching.get(key)
        return fetch if fetch is not None and self._index.has(fetch.entry) else None

    def fetch(
        self, tier: Tier, key: bytes, nbytes: int, num_tokens: int, entry_class: EntryClass, seconds: float | None
    ) -> None:
        """Begin to bring an entry up, unless the host tier has no room now; a hit of it will save so many `seconds`."""
        entry = self._index.reserve(key, nbytes, num_tokens, entry_class, seconds)
        if entry is None:
            self._counters.add("dropped_reads")
            return
        self._fetching[key] = Fetch(entry, tier)
        self._start(self._threads_of(tier).readers.submit(self._read, tier, entry))

    def _read(self, tier: Tier, entry: HostEntry) -> None:
        start = time.perf_counter()
        error: str | None = None
        try:
            self._read_parts(tier, entry)
        except EntryLostError as lost:
            error = str(lost)
        except Exception:
            logger.exception("VLCache: an entry could not be read from the %s tier", tier.name)
            error = "read"
        seconds = time.perf_counter() - start
        with self._lock:
            fetch = self._fetching.get(entry.key)
            if fetch is not None and fetch.entry is entry:  # else it was cleared, and is fetched once more
                del self._fetching[entry.key]
            if error is None:
                self._index.commit(entry)
                self._count(tier, "read", entry, seconds)
                if self._index.get(entry.key) is entry:
                    self._keep(entry, self.tiers[: self.tiers.index(tier)] if tier in self.tiers else self.tiers)
            else:
                self._index.discard(entry)
                self._counters.add("lost_entries", label=tier.name)

    def _read_parts(self, tier: Tier, entry: HostEntry) -> None:
        meta, kept = self._bytes.kept(entry)
        tier.read(meta, kept)
        for parts in self._bytes.ranks(entry)[len(kept) :]:
            for part, read in zip(parts, kept[0], strict=True):
                part.buffer[:] = read.buffer

    # -- down ---------------------------------------------------------------------------------------------------------

    def keep(self, entry: HostEntry) -> None:
        """Write a new entry to the tiers below, in time."""
        self._keep(entry, self.tiers)

    def _keep(self, entry: HostEntry, tiers: Sequence[Tier]) -> None:
        for tier in tiers:
            if tier.find(entry.key) is None:
                self._queue(tier, entry)

    def _queue(self, tier: Tier, entry: HostEntry) -> None:
        threads = self._threads_of(tier)
        unwritten_nbytes = threads.unwritten_nbytes + entry.extent.nbytes
        if unwritten_nbytes > self._max_unwritten_nbytes // len(self.tiers) and threads.unwritten_nbytes > 0:
            self._counters.add("dropped_writes", label="queue_full")
            return
        threads.unwritten_nbytes = unwritten_nbytes
        self._index.pin(entry, is_use=False)
        self._start(threads.writer.submit(self._write, tier, entry))

    def _write(self, tier: Tier, entry: HostEntry) -> None:
        with self._lock:
            is_wanted = self._index.get(entry.key) is entry  # it may have been cleared while it waited
        if is_wanted:
            self._write_to(tier, entry)
        with self._lock:
            self._threads_of(tier).unwritten_nbytes -= entry.extent.nbytes
            self._index.unpin(entry)

    def _write_to(self, tier: Tier, entry: HostEntry) -> None:
        start = time.perf_counter()
        try:
            tier.write(*self._bytes.kept(entry))
        except Exception as error:
            if tier.name not in self._failing:  # said once, until a write succeeds again
                is_known = isinstance(error, OSError)
                logger.warning(
                    "VLCache: the %s tier did not keep an entry: %s", tier.name, error, exc_info=not is_known
                )
            self._failing.add(tier.name)
            self._counters.add("dropped_writes", label="error")
            return
        self._failing.discard(tier.name)
        self._count(tier, "written", entry, time.perf_counter() - start)

    # -- both ---------------------------------------------------------------------------------------------------------

    def wait_for_room(self) -> None:
        """Until few enough moves are under way, without the lock: for who begins many."""
        while len(moves := tuple(self._under_way)) >= _MANY_MOVES:
            wait(moves, return_when=FIRST_COMPLETED)

    def drain(self, timeout_s: float | None) -> bool:
        """Wait, without the lock, until nothing is on its way; False when that takes too long."""
        return not wait(tuple(self._under_way), timeout_s).not_done

    def close(self) -> None:
        """End all threads. What is on its way gets a little time."""
        self._is_closed.set()
        if not self.drain(_LAST_MOVES_S):
            logger.warning("VLCache: some entries were not written to the tiers below in time")
        for threads in self._threads.values():
            threads.shutdown()
        for tier in self.tiers:
            tier.close()

    def _threads_of(self, tier: Tier) -> _Threads:
        if tier.name not in self._threads:
            self._threads[tier.name] = _Threads(tier.name)
        return self._threads[tier.name]

    def _start(self, move: "Future[None]") -> None:
        self._under_way.add(move)
        move.add_done_callback(self._under_way.discard)

    def _count(self, tier: Tier, done: str, entry: HostEntry, seconds: float) -> None:
        self._counters.add(f"{done}_entries", label=tier.name)
        num_copies = 1 if entry.entry_class.kind == "embedding" else self._bytes.num_ranks
        self._counters.add(f"{done}_bytes", entry.extent.nbytes * num_copies, label=tier.name)
        self._counters.add(f"{done}_seconds", seconds, label=tier.name)

    def _refresh(self) -> None:
        while not self._is_closed.wait(_REFRESH_S):
            for tier in self.tiers:
                try:
                    tier.refresh()
                except Exception:
                    logger.exception("VLCache: the %s tier could not be looked through", tier.name)
