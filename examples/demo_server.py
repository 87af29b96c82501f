"""A real vLLM server as a context manager: started in a session of its own, stopped with everything it started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    # vLLM keeps one core free for its scheduler, which spins, and one more with a KV connector; of only two cores it
    # then keeps none. Left alone, the server with the flag would compute with two threads and plain vLLM with one.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that reset caches and ask the worker
}
START_LIMIT_S = 180
STOP_LIMIT_S = 30
TAIL_LINES = 30


class ServerError(Exception):
    """The server did not start, did not stop, or answered an error. Its log is shown by whoever stops it."""


class Server:
    """A running server: `post` asks it something."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process, self._url = process, f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 300) -> Any:
        """The JSON answer, None when it is empty. Raises `ServerError`."""
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"POST {path}: {error.code} {error.read().decode()[:500]}") from error
        except OSError as error:
            raise ServerError(f"POST {path}: {error}") from error
        return json.loads(content) if content else None

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended with status {self._process.returncode} while starting")
            with contextlib.suppress(OSError), urllib.request.urlopen(self._url + "/health", timeout=2):
                return
            time.sleep(0.25)
        raise ServerError(f"the server was not ready after {START_LIMIT_S} s")


@contextlib.contextmanager
def serve(model: Path, options: list[str], log: Path) -> Iterator[Server]:
    """Serve `model`; on the way out everything is stopped, and after an error the end of the log is printed."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]  # `vllm serve`
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**ENVIRONMENT, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(process, port)
        server.wait_until_ready()
        yield server
    except Exception:
        print_tail(log)
        raise
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        try:
            stop(process)
        finally:
            signal.signal(signal.SIGINT, before)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole session to end, then insist. Raises `ServerError` when something survives even that."""
    for sent, limit_s in ((signal.SIGTERM, STOP_LIMIT_S), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            process.poll()  # reaps the leader
            if not session_members(process.pid):
                return
            time.sleep(0.1)
    raise ServerError(f"processes of the server are still there: {session_members(process.pid)}")


def session_members(session: int) -> list[int]:
    """Living processes of the session, whatever group they moved to."""
    members = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = status.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                members.append(int(status.parent.name))
    return members


def print_tail(log: Path) -> None:
    """The end of a log; before it the errors it names, because the cause is often far from the end."""
    lines = log.read_text(errors="replace").splitlines()
    mentions = [line for line in dict.fromkeys(lines) if re.search(r"\b\w*(Error|Exception): ", line)]
    errors = [line for line in mentions if " WARNING " not in line]
    if errors:
        print(f"\nErrors in {log.name}:\n" + "\n".join(errors[:TAIL_LINES]))
    print(f"\nThe end of {log.name}:\n" + "\n".join(lines[-TAIL_LINES:]) + "\n")


def worker_cores(log: Path) -> list[str]:
    """The cores that vLLM bound its workers to, as its log says; empty where it binds none."""
    return re.findall(r"local_rank=\d+, core ids=(\[.*?\])", log.read_text(errors="replace"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
