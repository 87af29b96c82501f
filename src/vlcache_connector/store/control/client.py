"""The command line's end of the control socket: finds running caches and asks them."""

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcache_connector.store.control import folder
from vlcache_connector.store.control.protocol import ControlError, Message, NoCacheError, result_of
from vlcache_connector.store.control.server import remove_dead

FIRST_ANSWER_TIMEOUT_S = 10.0
NEXT_ANSWER_TIMEOUT_S = 600.0  # the slowest: reading all files of a large cache between two lines of progress


@dataclass(frozen=True, slots=True)
class RunningCache:
    """A running cache behind its socket: `CacheCommands` by asking."""

    path: Path

    def about(self) -> Message:
        found: Message = result_of(self._ask({"command": "about"}, FIRST_ANSWER_TIMEOUT_S))
        return found

    def list_entries(self, limit: int, sort: str) -> Iterator[Message]:
        return self._ask({"command": "ls", "limit": limit, "sort": sort})

    def check(self, deep: bool) -> Iterator[Message]:
        return self._ask({"command": "check", "deep": deep})

    def clear(self, tiers: list[str]) -> Message:
        removed: Message = result_of(self._ask({"command": "clear", "tiers": tiers}))
        return removed

    def snapshot(self, path: Path, bandwidth: int | None) -> Iterator[Message]:
        return self._ask({"command": "snapshot", "path": str(path.absolute()), "bandwidth": bandwidth})

    def cancel_snapshot(self) -> bool:
        return bool(result_of(self._ask({"command": "cancel_snapshot"})))

    def _ask(self, request: Message, timeout_s: float = NEXT_ANSWER_TIMEOUT_S) -> Iterator[Message]:
        """The answers, up to the result. Raises `ControlError` for an error, also for one of the connection."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout_s)
                self._connect(connection)
                # A refusal may come, and the connection end, before all of the request was read.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(json.dumps(request).encode() + b"\n")
                with connection.makefile("rb") as lines:
                    for line in lines:
                        message = _parsed(line)
                        yield message
                        if "result" in message:
                            return
        except TimeoutError:
            raise ControlError(f"{self.path} does not answer; is its engine stopped or stuck?") from None
        except OSError as error:
            raise ControlError(f"the connection to {self.path} broke ({error})") from error
        raise ControlError(f"{self.path} ended the connection without an answer; the engine's log may say why")

    def _connect(self, connection: socket.socket) -> None:
        try:
            connection.connect(str(self.path))
        except OSError as error:
            raise NoCacheError(f"no cache answers at {self.path} ({error.strerror or error})") from error


def discover() -> list[tuple[RunningCache, Message]]:
    """All running caches of this user with what each says about itself, by process id. Sockets of dead processes are
    removed on the way; what does not answer is left out.
    """
    found = []
    for where in folder.candidates():
        try:
            folder.require_private(where)
            remove_dead(where)
            paths = sorted(where.glob("*.sock"))
        except (FileNotFoundError, ControlError):
            continue  # no server of ours would have used it
        for path in paths:
            with contextlib.suppress(ControlError):
                cache = RunningCache(path)
                found.append((cache, cache.about()))
    return sorted(found, key=lambda each: int(each[1].get("pid", 0)))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise ControlError("the answer is not JSON: this is no socket of a cache, or of another version")
    if "error" in message:
        raise ControlError(str(message["error"]))
    return message
