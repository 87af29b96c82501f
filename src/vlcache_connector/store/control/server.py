"""The scheduler process's end of the control socket: daemon threads that answer while the engine runs.

Nothing that arrives here, and no bug in a command, reaches the engine: a client gets an error, the log a line.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Generator, Mapping
from pathlib import Path

from vlcache_connector.errors import VLCacheError
from vlcache_connector.store.control import folder
from vlcache_connector.store.control.protocol import MAX_REQUEST_NBYTES, Command, ControlError, Message

logger = logging.getLogger(f"vllm.{__name__}")  # under the name whose level and format vLLM sets

REQUEST_TIMEOUT_S = 5.0  # for a client to say what it wants, all in all
ANSWER_TIMEOUT_S = 60.0  # for a client to read what was sent
MAX_CLIENTS = 64
_MAX_PATH_NBYTES = 107  # of a unix socket's address


class ControlServer:
    """Answers commands on a socket of its own until `close`, or until the process ends.

    `commands` are called in threads of this server, several at a time. `name` tells the engines of one process apart.
    A socket that cannot be made is a warning in the log: the engine goes on without one, and `path` is None.
    """

    def __init__(self, commands: Mapping[str, Command], name: str) -> None:
        self._commands = commands
        self._clients = threading.BoundedSemaphore(MAX_CLIENTS)
        self.path: Path | None = None
        try:
            where = folder.prepare()
            remove_dead(where)
            self.path, self._socket = _listen(where, name)
        except (OSError, ControlError) as error:
            logger.warning("The command vlcache cannot reach this engine: %s", error)
            return
        self._finalizer = weakref.finalize(self, _withdraw, self._socket, self.path, os.getpid())
        threading.Thread(
            target=_accept, args=(weakref.ref(self), self._socket), daemon=True, name="vlcache-ctl"
        ).start()
        logger.info("The command vlcache reaches this engine through %s", self.path)

    def close(self) -> None:
        """Take the socket away. Commands that run go on until they end."""
        if self.path is not None:
            self._finalizer()

    def serve(self, client: socket.socket) -> None:
        """One connection in a thread of its own, or an answer that there are too many."""
        if not self._clients.acquire(blocking=False):
            with client, contextlib.suppress(OSError):
                client.settimeout(REQUEST_TIMEOUT_S)
                client.sendall(_line({"error": f"{MAX_CLIENTS} clients are being served; try again later"}))
            return
        try:
            threading.Thread(target=self._converse, args=(client,), daemon=True, name="vlcache-client").start()
        except RuntimeError as error:  # the process has too many threads
            self._clients.release()
            client.close()
            logger.warning("A client of the control socket was turned away: %s", error)

    def _converse(self, client: socket.socket) -> None:
        try:
            with client:
                client.settimeout(REQUEST_TIMEOUT_S)
                with contextlib.closing(self._answer(client)) as answer:
                    for line in answer:
                        client.sendall(line)
        except OSError as error:  # it went away or stopped reading
            logger.debug("A client of the control socket was lost: %s", error)
        finally:
            self._clients.release()

    def _answer(self, client: socket.socket) -> Generator[bytes, None, None]:
        """All lines for one client; the last is a result or an error."""
        try:
            _require_owner(client)
            request = _read_request(client)
            name = request.get("command")
            if not isinstance(name, str) or name not in self._commands:
                raise ControlError(f"there is no command {name!r}; there are {', '.join(sorted(self._commands))}")
            client.settimeout(ANSWER_TIMEOUT_S)
            for message in self._commands[name](request):
                yield _line(message)
        except (VLCacheError, OSError) as error:
            yield _line({"error": str(error)})
        except Exception as error:
            logger.exception("A command of the control socket failed")
            why = f"{type(error).__name__}: {error}"
            yield _line({"error": f"the engine could not do this ({why}); its log says more"})


def remove_dead(where: Path) -> None:
    """Remove sockets of processes that ended without doing it themselves."""
    for path in where.glob("*-*.*"):
        if path.suffix in (".sock", ".new") and _is_dead(path):
            logger.info("Removing %s, which nobody listens to", path)
            path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    """Whether nobody listens. A socket has its final name only once it listens, so this is no matter of timing."""
    pid = path.name.partition("-")[0]
    if path.suffix == ".new":
        return pid.isdecimal() and not _is_running(int(pid))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # it is busy, or not a socket of ours
            return False
    return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _listen(where: Path, name: str) -> tuple[Path, socket.socket]:
    """A listening socket that only this user can connect to, under its final name. Raises `OSError`, `ControlError`."""
    path = where / f"{os.getpid()}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.sock"
    if len(os.fsencode(path)) > _MAX_PATH_NBYTES:
        raise ControlError(f"{path} is too long for a socket; set {folder.VARIABLE} to a shorter folder")
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux gives the file this mode (less the umask) in the moment it appears. Changing the umask instead would be
        # seen by every thread of the engine.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(unfinished))
        unfinished.chmod(0o600)  # where the umask took more away
        listener.listen(MAX_CLIENTS)
        unfinished.rename(path)
    except OSError:
        listener.close()
        unfinished.unlink(missing_ok=True)
        raise
    return path, listener


def _withdraw(listener: socket.socket, path: Path, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child ends: the socket is not its own
    with contextlib.suppress(OSError):
        path.unlink()
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
    listener.close()


def _accept(server: "weakref.ref[ControlServer]", listener: socket.socket) -> None:
    """Runs in a thread until the listener is closed. Holds no server while it waits, so that one can be dropped."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            if listener.fileno() == -1:
                return
            time.sleep(0.1)  # out of file descriptors, perhaps
            continue
        owner = server()
        if owner is None:
            client.close()
            return
        owner.serve(client)
        del owner


def _require_owner(client: socket.socket) -> None:
    raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", raw)
    if uid not in (0, os.geteuid()):
        raise ControlError("only the user that runs the engine, or root, may ask it")


def _read_request(client: socket.socket) -> Message:
    """The one line that a client sends. Raises `ControlError` for anything else."""
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    received = bytearray()
    while b"\n" not in received:
        if len(received) > MAX_REQUEST_NBYTES:
            raise ControlError(f"the request is longer than {MAX_REQUEST_NBYTES} bytes")
        client.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            piece = client.recv(4096)
        except TimeoutError:
            raise ControlError(f"no request came within {REQUEST_TIMEOUT_S:.0f} s; send one line of JSON") from None
        if not piece:
            raise ControlError("the connection ended before the request did; send one line of JSON")
        received += piece
    try:
        request = json.loads(received.partition(b"\n")[0])
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise ControlError('the request is not one line of JSON like {"command": "about"}')
    return request


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"
