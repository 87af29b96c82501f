"""A process like an engine's scheduler process, as far as the command line can see: a real host index, a real control
server, no engine. Run as `small_host.py MODEL NUM_ENTRIES [busy|damaged]`; prints the socket's path when it can be
asked, and ends when its standard input does.

busy: a thread goes on inserting and evicting. damaged: two entries share bytes.
"""

import hashlib
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from vlcache_connector.errors import VLCacheError
from vlcache_connector.store.commands import LiveCommands
from vlcache_connector.store.control.protocol import Message, commands_of
from vlcache_connector.store.control.server import ControlServer
from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.host import HostEntry, HostIndex
from vlcache_connector.types import EntryClass

ENTRY_NBYTES = 1 << 20
KV, EMBEDDING = EntryClass("kv", "image", "00112233aabbccdd"), EntryClass("embedding", "image")


def key_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def insert(index: HostIndex, number: int, nbytes: int = ENTRY_NBYTES) -> HostEntry:
    """An entry of class KV (even numbers) or EMBEDDING (odd ones), with `number + 1` tokens."""
    entry = index.reserve(key_of(number), nbytes, number + 1, (KV, EMBEDDING)[number % 2])
    assert entry is not None
    index.commit(entry)
    return entry


@dataclass(frozen=True)
class Progress:
    state: str = "none"
    nbytes: int = 0
    written_entries: int = 0
    written_nbytes: int = 0
    seconds: float = 0.0
    error: str = ""


class SlowSnapshots:
    """Writes files of 20 pieces of zeros as snapshots: with 0.02 s, or what the bandwidth says, before each piece."""

    PIECE = 1 << 16

    def __init__(self) -> None:
        self.progress = Progress()
        self._cancelled = threading.Event()
        self._thread = threading.Thread()

    def start(self, target: Path, bytes_per_s: float | None = None) -> None:
        if self.progress.state == "writing":
            raise VLCacheError("a snapshot is being written already: wait for it or cancel it")
        self.progress = Progress("writing", 20 * self.PIECE)
        self._cancelled.clear()
        self._thread = threading.Thread(target=self._run, args=(target, bytes_per_s), daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> Progress:
        self._thread.join(timeout_s)
        return self.progress

    def cancel(self) -> None:
        self._cancelled.set()

    def _run(self, target: Path, bytes_per_s: float | None) -> None:
        try:
            self._write(target, self.PIECE / bytes_per_s if bytes_per_s else 0.02)
        except OSError as error:
            self.progress = replace(self.progress, state="failed", error=str(error))

    def _write(self, target: Path, pause_s: float) -> None:
        unfinished = target.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            for number in range(20):
                if self._cancelled.wait(pause_s):
                    unfinished.unlink()
                    self.progress = replace(self.progress, state="cancelled")
                    return
                nbytes = self.progress.written_nbytes + file.write(bytes(self.PIECE))
                self.progress = replace(self.progress, written_entries=number + 1, written_nbytes=nbytes)
        unfinished.rename(target)
        self.progress = replace(self.progress, state="done", seconds=20 * pause_s)


def keep_busy(index: HostIndex, lock: threading.RLock, first: int) -> None:
    """Insert for ever; the index is full, so that each insertion evicts."""
    number = first
    while True:
        with lock:
            insert(index, number)
        number += 1


def serve(model: str, num_entries: int, state: str) -> None:
    index, lock = HostIndex(max(num_entries, 1) * ENTRY_NBYTES, LRU()), threading.RLock()
    entries = [insert(index, number) for number in range(num_entries)]
    if state == "damaged":
        entries[1].extent = entries[0].extent
    started_s = time.time()

    def about() -> Message:
        return {"pid": os.getpid(), "model": model, "version": "0", "started_s": started_s}

    commands = LiveCommands(index, lock, [], about, SlowSnapshots())
    server = ControlServer(commands_of(commands), name=model)
    if state == "busy":
        threading.Thread(target=keep_busy, args=(index, lock, num_entries), daemon=True).start()
    print(server.path, flush=True)
    sys.stdin.read()
    server.close()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), *sys.argv[3:] or ["quiet"])
