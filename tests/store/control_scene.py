"""A control server in the test's own process, whose commands do what tests need."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

from vlcache_connector.errors import VLCacheError
from vlcache_connector.store.control.protocol import Message
from vlcache_connector.store.control.server import ControlServer

ABOUT = {"pid": 1, "model": "m", "started_s": 0.0, "tiers": []}


class Scene:
    """A server whose commands do what the tests need."""

    def __init__(self) -> None:
        self.waiting, self.go_on = threading.Semaphore(0), threading.Event()
        self.closed = threading.Event()
        commands = {"about": lambda _: iter([{"result": ABOUT}]), "echo": lambda request: iter([{"result": request}])}
        self.server = ControlServer({**commands, "wait": self.wait, "flood": self.flood, "fail": self.fail}, "scene")
        assert self.server.path is not None
        self.path = self.server.path

    def wait(self, _: Message) -> Iterator[Message]:
        self.waiting.release()
        self.go_on.wait()
        yield {"result": "waited"}

    def flood(self, _: Message) -> Iterator[Message]:
        try:
            while True:
                yield {"progress": "x" * 4096}
        finally:
            self.closed.set()

    def fail(self, request: Message) -> Iterator[Message]:
        if request["how"] == "told":
            raise VLCacheError("do it the other way")
        if request["how"] == "unserialisable":
            yield {"result": object()}
        if request["how"] == "bug":
            raise ZeroDivisionError("a bug")

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(self.path))
        return connection

    def ask(self, raw: bytes) -> list[Any]:
        """All answers to what is sent."""
        with self.connect() as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
                connection.sendall(raw)
            return answers(connection)

    def is_alive(self) -> bool:
        return self.ask(b'{"command": "about"}\n') == [{"result": ABOUT}]


def answers(connection: socket.socket) -> list[Any]:
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass  # the server did not read all
    return [json.loads(line) for line in received.splitlines()]
