"""Snapshots of the host tier while it serves. Runs in the scheduler's process, in a thread of its own.

The thread takes entries of the image from the index one by one, tells another process where their bytes are, and lets
go of them when that process has written them. Bytes are hashed, written and waited for over there, because a thread
here would share the interpreter lock with the scheduler. Measured while the scheduler's thread never pauses: a thread
waits 5 ms for the lock after each call of the system and needs 34 to 42 s for a snapshot of 1 GiB that takes 4 s at its
cap of 256 MiB/s, and the scheduler stops for up to 16 ms; the process needs 4.3 to 7.5 s, and the scheduler stops for
up to 8 ms, where 5 ms come from the machine (`busy-` in tests/bench/snapshot_windows.py). Starting a process stops all
Python here for up to 6 ms, so an engine that keeps snapshots starts it before requests come.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from vlcache_connector.errors import SnapshotError
from vlcache_connector.store.base import EntryMeta, Part
from vlcache_connector.store.host import HostEntry, HostIndex
from vlcache_connector.store.snapshot import wire
from vlcache_connector.store.snapshot.folder import remove_partial
from vlcache_connector.store.snapshot.process import SnapshotProcess
from vlcache_connector.store.snapshot.wire import Answer, Order, SharedSlab

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, so its handlers and level apply

Describe = Callable[[HostEntry], tuple[EntryMeta, Sequence[Sequence[Part]]]]

# Entries that the other process has in hand: enough that it never waits for us.
MAX_IN_FLIGHT = 16
MAX_IN_FLIGHT_NBYTES = 32 << 20  # per rank; one entry may be larger
# Between two entries the scheduler gets the interpreter, also when it did not ask for it early enough.
PAUSE_S = 1e-4


class SnapshotState(StrEnum):
    NONE = "none"  # since the start of the process
    PREPARING = "preparing"
    WRITING = "writing"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        return self not in (SnapshotState.PREPARING, SnapshotState.WRITING)


@dataclass(frozen=True, slots=True)
class SnapshotProgress:
    """How far the latest snapshot is. Bytes are those of one rank's slab."""

    state: SnapshotState = SnapshotState.NONE
    target: Path | None = None
    num_entries: int = 0
    nbytes: int = 0
    written_entries: int = 0
    written_nbytes: int = 0
    seconds: float = 0.0  # from the moment of the image
    error: str = ""


class _CancelledError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Job:
    target: Path
    bytes_per_s: float | None
    facts: str


class SnapshotWriter:
    """Writes one snapshot after the other. `lock` guards the index; `describe` names the parts of an entry."""

    def __init__(
        self, index: HostIndex, lock: AbstractContextManager[object], describe: Describe, slabs: Sequence[SharedSlab]
    ) -> None:
        self._index = index
        self._lock = lock
        self._describe = describe
        self._slabs = slabs
        self._starts = [wire.address(slab.view) for slab in slabs]
        self._process = SnapshotProcess(slabs)
        self._in_flight: deque[HostEntry] = deque()
        self._progress = SnapshotProgress()
        self._number = 0
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vlcache-snapshot", daemon=True)
        self._thread.start()

    @property
    def progress(self) -> SnapshotProgress:
        """Any thread."""
        return self._progress

    @property
    def pid(self) -> int:
        """Of the process that writes."""
        return self._process.pid

    def start(self, target: Path, bytes_per_s: float | None = None, facts: str = "") -> None:
        """Begin a snapshot; returns at once. `bytes_per_s` caps the writing, over all ranks; `facts` say which engines
        have use for it.

        The image is of one moment shortly after the call, when the old litter at the target was removed. Raises
        `SnapshotError` while another snapshot is being written.
        """
        if not self._progress.state.is_over:
            raise SnapshotError(f"a snapshot to {self._progress.target} is being written: wait for it or cancel it")
        self._is_idle.clear()
        self._progress = SnapshotProgress(SnapshotState.PREPARING, target)
        self._number += 1
        self._jobs.put(_Job(target, bytes_per_s, facts))

    def cancel(self) -> None:
        """Give the running snapshot up, if there is one. `wait` tells when nothing is left of it."""
        self._process.send(Order.CANCEL, self._number)

    def wait(self, timeout_s: float | None = None) -> SnapshotProgress:
        """Until the running snapshot is over, or the time is."""
        self._is_idle.wait(timeout_s)
        return self._progress

    def close(self) -> None:
        """Cancel what is running and end the process."""
        self.cancel()
        self._jobs.put(None)
        self._thread.join()
        self._process.close()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(job)
                self._over(SnapshotState.DONE)
            except _CancelledError:
                self._over(SnapshotState.CANCELLED)
            except Exception as error:
                logger.warning("Snapshot to %s failed: %s", job.target, error)
                self._over(SnapshotState.FAILED, str(error))
            self._is_idle.set()

    def _over(self, state: SnapshotState, error: str = "") -> None:
        self._progress = replace(self._progress, state=state, error=error)

    def _write(self, job: _Job) -> None:
        if not self._process.is_running:
            self._process.close()
            self._process = SnapshotProcess(self._slabs)
        try:
            self._send(Order.BEGIN, _content_of(job))
            self._expect(Answer.BEGUN)
            self._send(Order.FINISH, self._stream())
            self._expect(Answer.FINISHED)
        except Exception:
            if self._process.is_running:
                self.cancel()  # which it ignores when it was the one that gave up
            else:
                remove_partial(job.target)
            raise

    def _stream(self) -> float:
        """Everything of the image; returns when it was fixed, in seconds since the epoch."""
        started = time.monotonic()
        with self._lock:
            size = self._index.begin_snapshot()
            taken_at = time.time()
        self._progress = replace(
            self._progress, state=SnapshotState.WRITING, num_entries=size.num_entries, nbytes=size.nbytes
        )
        try:
            while self._fill() or self._in_flight:
                self._expect(Answer.WRITTEN)
                self._let_go(started)
        finally:
            with self._lock:
                while self._in_flight:
                    self._index.unpin(self._in_flight.popleft())
                self._index.end_snapshot()
        return taken_at

    def _fill(self) -> bool:
        """Send entries until the other process has enough in hand. False when none is left."""
        while not self._has_enough():
            with self._lock:
                entry = self._index.next_of_snapshot()
            if entry is None:
                return False
            self._in_flight.append(entry)
            self._send(Order.WRITE, wire.outline(*self._describe(entry), self._starts))
            time.sleep(PAUSE_S)
        return True

    def _has_enough(self) -> bool:
        nbytes = sum(entry.extent.nbytes for entry in self._in_flight)
        return len(self._in_flight) >= MAX_IN_FLIGHT or nbytes >= MAX_IN_FLIGHT_NBYTES

    def _let_go(self, started: float) -> None:
        """The oldest entry in flight is on disk."""
        entry = self._in_flight.popleft()
        with self._lock:
            self._index.unpin(entry)
        self._progress = replace(
            self._progress,
            written_entries=self._progress.written_entries + 1,
            written_nbytes=self._progress.written_nbytes + entry.extent.nbytes,
            seconds=time.monotonic() - started,
        )

    def _send(self, order: Order, content: Any) -> None:
        self._process.send(order, self._number, content)

    def _expect(self, answer: Answer) -> None:
        if (given := self._process.answer(self._number)) is Answer.CANCELLED:
            raise _CancelledError
        assert given is answer, f"{given} instead of {answer}"


def _content_of(job: _Job) -> dict[str, Any]:
    return {"target": str(job.target.absolute()), "bytes_per_s": job.bytes_per_s, "facts": job.facts}
