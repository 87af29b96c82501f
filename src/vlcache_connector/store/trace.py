"""Records what happens to the entries of the host tier, for `vlcache simulate`. Off unless a path is configured.

Scheduler side. One JSON object per line: a header, then events. No content: keys and tenants are hashed with a random
salt that is kept nowhere, so two traces cannot be compared with each other or with anything else.

    {"vlcache_trace": 1, "capacity": 4294967296}
    {"t": 1.25, "op": "hit", "key": "5e...", "nbytes": 1024, "seconds": 0.1, "class": ["kv", "image", ""]}

`t` counts seconds from the start of the trace. `op` is one of `OPS`; `hit` and `miss` are the first look-up of an entry
by a request, `evict` has a `reason` as well. `seconds` is the engine time that a hit saves, null while it has no price.

The engine only appends to a queue; a thread writes. Nothing here raises into the engine: what does not fit the queue is
dropped, and the first error of the file ends the trace with one log line.
"""

import json
import logging
import os
import secrets
import threading
import time
from collections import deque
from hashlib import blake2b
from pathlib import Path
from typing import IO

from vlcache_connector.types import EntryClass

FORMAT = 1
OPS = ("hit", "miss", "insert", "evict")
MAX_NBYTES = 4 << 30  # of a file: a forgotten trace must not fill the disk
_MAX_QUEUED = 100_000  # events
_PAUSE_S = 0.5  # between writes
_MAX_FILES = 1000

logger = logging.getLogger(f"vllm.{__name__}")

_Event = tuple[float, str, bytes, int, float | None, EntryClass, str]


class Trace:
    """Writes to `path`, or to `path` with a number behind it where such a file exists already."""

    def __init__(self, path: str, capacity_nbytes: int) -> None:
        self._start_s = time.monotonic()
        self._salt = secrets.token_bytes(32)
        self._events: deque[_Event] = deque()
        self._dropped = 0
        self._nbytes = 0
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._file = _create(Path(path))
        except OSError as error:
            self._is_over.set()
            logger.warning("VLCache records no trace: %s", error)
            return
        header = {"vlcache_trace": FORMAT, "capacity": capacity_nbytes}
        self._thread = threading.Thread(target=self._run, args=(header,), name="vlcache-trace", daemon=True)
        self._thread.start()
        logger.info("VLCache records a trace in %s", self._file.name)

    def looked_up(self, key: bytes, nbytes: int, seconds: float | None, entry_class: EntryClass, is_hit: bool) -> None:
        self._add("hit" if is_hit else "miss", key, nbytes, seconds, entry_class)

    def inserted(self, key: bytes, nbytes: int, seconds: float | None, entry_class: EntryClass) -> None:
        self._add("insert", key, nbytes, seconds, entry_class)

    def evicted(self, key: bytes, nbytes: int, entry_class: EntryClass, reason: str) -> None:
        self._add("evict", key, nbytes, None, entry_class, reason)

    def close(self) -> None:
        """Write what is queued and close the file; a disk that hangs is not waited for."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _add(
        self, op: str, key: bytes, nbytes: int, seconds: float | None, entry_class: EntryClass, reason: str = ""
    ) -> None:
        if self._is_over.is_set():
            return
        if len(self._events) >= _MAX_QUEUED:
            self._dropped += 1
            return
        self._events.append((time.monotonic() - self._start_s, op, key, nbytes, seconds, entry_class, reason))

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self, header: dict[str, int]) -> None:
        try:
            with self._file:
                self._write(json.dumps(header) + "\n")
                is_over = False
                while not is_over:
                    is_over = self._is_over.wait(_PAUSE_S)
                    lines = [self._line(self._events.popleft()) for _ in range(len(self._events))]
                    self._write("".join(lines))
        except OSError as error:
            logger.warning("VLCache ends its trace: %s", error)
        finally:
            self._is_over.set()
            self._events.clear()
        if self._dropped:
            logger.warning("VLCache: %d events are missing in the trace, the disk was too slow", self._dropped)

    def _write(self, text: str) -> None:
        self._nbytes += len(text)
        if self._nbytes > MAX_NBYTES:
            raise OSError(f"{self._file.name} has reached {MAX_NBYTES >> 30} GiB")
        self._file.write(text)
        self._file.flush()

    def _line(self, event: _Event) -> str:
        t, op, key, nbytes, seconds, entry_class, reason = event
        tenant = self._hash(entry_class.tenant.encode()) if entry_class.tenant else ""
        fields = {"t": round(t, 6), "op": op, "key": self._hash(key), "nbytes": nbytes, "seconds": seconds}
        extra = {"reason": reason} if reason else {}
        return json.dumps(fields | {"class": [entry_class.kind, entry_class.modality, tenant]} | extra) + "\n"

    def _hash(self, text: bytes) -> str:
        return blake2b(text, digest_size=12, key=self._salt).hexdigest()


def _create(path: Path) -> IO[str]:
    """A new file that only its owner can read. An existing one is another run's: it has another salt."""
    candidates = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, _MAX_FILES))]
    for candidate in candidates:
        try:
            return open(candidate, "x", opener=lambda name, flags: os.open(name, flags, 0o600))
        except FileExistsError:
            continue
    raise FileExistsError(f"{path} and {_MAX_FILES - 1} more of that name exist")
