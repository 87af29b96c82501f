"""A real Redis server for tests, and a road to it that can be slow, stand still or be cut."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMESPACE = "vlcache-1"

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is missing; apt-get install redis-server"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """On a free port of the loopback address; keeps its values across `restart` in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "no", "--loglevel", "warning"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, RuntimeError):
                if self.ask("PING") == b"PONG":
                    return
            time.sleep(0.02)
        raise RuntimeError("redis-server did not start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    def blobs(self) -> list[bytes]:
        return sorted(key for key in self.ask("KEYS", f"{NAMESPACE}@*") if b"@00000000@" not in key)

    def ask(self, *words: str | bytes) -> Any:
        """One command; its reply as bytes, an int, None or a list of these."""
        raw = [word if isinstance(word, bytes) else word.encode() for word in words]
        with socket.create_connection(("127.0.0.1", self.port), 10) as connection, connection.makefile("rb") as file:
            connection.sendall(b"*%d\r\n" % len(raw) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in raw))
            return _reply(file)


def _reply(file: Any) -> Any:
    line = file.readline()[:-2]
    kind, rest = line[:1], line[1:]
    if kind == b"+":
        return rest
    if kind == b":":
        return int(rest)
    if kind == b"$":
        return None if int(rest) < 0 else file.read(int(rest) + 2)[:-2]
    if kind == b"*":
        return [_reply(file) for _ in range(int(rest))]
    raise RuntimeError(f"Redis says {line!r}")


class Road:
    """A TCP proxy to a server on `port`."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.is_open = threading.Event()  # while it is not set, nothing moves
        self.is_open.set()
        self.delay_s = 0.0  # of every piece of an answer
        self.num_delayed = 0
        self.num_connections = 0
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """All connections, at once; new ones are let through."""
        pairs, self._pairs = self._pairs, []
        for end in pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.is_open.set()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.num_connections += 1
                try:
                    far = socket.create_connection(("127.0.0.1", self._target), 10)
                except OSError:
                    near.close()
                    continue
                self._pairs += [near, far]
                for ends in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(1 << 16):
                self.is_open.wait()
                if is_answer and self.delay_s > 0:
                    time.sleep(self.delay_s)
                    self.num_delayed += 1
                target.sendall(data)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.stop()
