"""The process that writes snapshots, `python -m vlcache_connector.store.snapshot.program`; see `SnapshotProcess`.

Arguments: for each rank the number of an inherited descriptor and the slab's size, as FD:NBYTES. It hashes, writes and
sleeps on the bandwidth cap with an interpreter lock of its own. When its standard input ends, the engine has ended: the
partial snapshot is removed. No torch.
"""

import json
import math
import mmap
import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.snapshot import wire
from vlcache_connector.store.snapshot.folder import UNBOUNDED, Manifest, PartialFolder
from vlcache_connector.store.snapshot.wire import Answer, Order

NICENESS = 10  # the engine goes first


class Orders:
    """Orders as they come in, and at once whether the snapshot they belong to was cancelled."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._queue: queue.SimpleQueue[tuple[Order, int, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def next(self) -> tuple[Order, int, Any] | None:
        """None when the engine has ended."""
        return self._queue.get()

    def _read(self) -> None:
        begun = cancelled = 0  # numbers of snapshots
        for line in sys.stdin.buffer:
            kind, number, content = json.loads(line)
            if kind == Order.BEGIN:
                begun = number
                self.cancelled.clear()
            elif kind == Order.CANCEL:
                cancelled = number
            if cancelled == begun:
                self.cancelled.set()  # the writer sees it in the middle of a pause
            self._queue.put((Order(kind), number, content))
        self.cancelled.set()
        self._queue.put(None)


class Pace:
    """A cap on bytes per second. Bytes that were not used are lost: no burst after a pause."""

    def __init__(self, bytes_per_s: float | None, cancelled: threading.Event) -> None:
        self._seconds_per_byte = 1 / bytes_per_s if bytes_per_s else 0.0
        self._cancelled = cancelled
        self._next = -math.inf

    def wait_for(self, nbytes: int) -> bool:
        """Sleep until so many bytes may be written. False when the snapshot was cancelled."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + nbytes * self._seconds_per_byte
        return not (self._cancelled.wait(start - now) if start > now else self._cancelled.is_set())


class Image:
    """One snapshot in the making."""

    def __init__(self, content: dict[str, Any], slabs: list[memoryview], cancelled: threading.Event) -> None:
        self._slabs = slabs
        self._facts: str = content["facts"]
        self._pace = Pace(content["bytes_per_s"], cancelled)
        self._folder = PartialFolder(Path(content["target"]))
        self._keys: list[bytes] = []
        self._nbytes = 0
        try:
            self._tier = DiskTier(self._folder.entries, UNBOUNDED, len(slabs), num_threads=1)
        except BaseException:
            self._folder.remove()
            raise

    def write(self, content: list[Any]) -> None:
        meta, ranks = wire.entry_of(content, self._slabs)
        nbytes = sum(part.buffer.nbytes for parts in ranks for part in parts)
        if self._pace.wait_for(nbytes):
            self._tier.write(meta, ranks)
            self._keys.append(meta.key)
            self._nbytes += nbytes

    def complete(self, taken_at: float) -> None:
        """`taken_at`: seconds since the epoch when the image was fixed."""
        self._tier.close()
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(taken_at))
        seconds = round(time.time() - taken_at, 3)
        manifest = Manifest(len(self._slabs), len(self._keys), self._nbytes, when, seconds, _version(), self._facts)
        self._folder.complete(manifest, self._keys)

    def remove(self) -> None:
        self._folder.remove()


class Program:
    def __init__(self, slabs: list[memoryview]) -> None:
        self._slabs = slabs
        self._orders = Orders()
        self._image: Image | None = None
        self._number = 0

    def run(self) -> None:
        try:
            while (order := self._orders.next()) is not None:
                self._answer_to(*order)
        finally:
            self._drop()

    def _answer_to(self, kind: Order, number: int, content: Any) -> None:
        reason = None
        try:
            answer = self._follow(kind, number, content)
        except Exception as error:
            self._drop()
            answer, reason = Answer.FAILED, str(error) or type(error).__name__
        if answer is not None:
            with suppress(BrokenPipeError):  # the engine has ended
                os.write(sys.stdout.fileno(), wire.line(answer, number, reason))

    def _follow(self, kind: Order, number: int, content: Any) -> Answer | None:
        if kind is Order.BEGIN:
            return self._begin(number, content)
        if self._image is None or number != self._number:
            return None  # the rest of a snapshot that failed, or a cancellation out of season
        if kind is Order.WRITE:
            self._image.write(content)
            return Answer.WRITTEN
        if kind is Order.FINISH:
            self._image.complete(content)
            self._image = None
            return Answer.FINISHED
        self._drop()
        return Answer.CANCELLED

    def _begin(self, number: int, content: Any) -> Answer:
        if self._orders.cancelled.is_set():
            return Answer.CANCELLED
        self._number = number
        self._image = Image(content, self._slabs, self._orders.cancelled)
        return Answer.BEGUN

    def _drop(self) -> None:
        if self._image is not None:
            self._image.remove()
            self._image = None


def _version() -> str:
    try:
        return version("vlcache-connector")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's; it tells us by closing the pipe
    os.nice(NICENESS)
    slabs = []
    for argument in sys.argv[1:]:
        fd, nbytes = map(int, argument.split(":"))
        slabs.append(memoryview(mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)))
    Program(slabs).run()


if __name__ == "__main__":
    main()
