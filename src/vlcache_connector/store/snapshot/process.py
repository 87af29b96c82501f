"""The scheduler's end of the process that writes snapshots (`program.py`)."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

from vlcache_connector.errors import SnapshotError
from vlcache_connector.store.snapshot import wire
from vlcache_connector.store.snapshot.wire import Answer, Order, SharedSlab

_PROGRAM = "vlcache_connector.store.snapshot.program"

_PATIENCE_S = 10


class SnapshotProcess:
    """Starts the process; call this early, because starting one stops all Python of this process for milliseconds."""

    def __init__(self, slabs: Sequence[SharedSlab]) -> None:
        descriptors = [slab.fd for slab in slabs]
        arguments = [f"{slab.fd}:{slab.view.nbytes}" for slab in slabs]
        self._sending = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # a signal to the engine's group leaves it time to clean up
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def send(self, order: Order, number: int, content: Any = None) -> None:
        """Any thread. A process that died is noticed by `answer`."""
        with self._sending, contextlib.suppress(BrokenPipeError, ValueError):
            self._orders.write(wire.line(order, number, content))
            self._orders.flush()

    def answer(self, number: int) -> Answer:
        """Wait for the next answer about this snapshot. Raises `SnapshotError` when it failed or the process died."""
        while (line := self._answers.readline()).endswith(b"\n"):
            kind, about, content = json.loads(line)
            if about == number:
                break
        else:
            raise SnapshotError(f"the process that writes snapshots ended with status {self._process.wait()}")
        if kind == Answer.FAILED:
            raise SnapshotError(f"the snapshot was given up: {content}")
        return Answer(kind)

    def close(self) -> None:
        """A snapshot that is being written is removed."""
        with self._sending, contextlib.suppress(BrokenPipeError):
            self._orders.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:  # on a disk that does not answer; the next snapshot cleans up
            self._process.kill()
        self._answers.close()
