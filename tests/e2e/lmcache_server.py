"""A real `lmcache server`, which keeps the KV that LMCache's connector sends it."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from redis_server import free_port

START_TIMEOUT_S = 120


@contextlib.contextmanager
def lmcache_server(log: Path, chunk_tokens: int) -> Iterator[int]:
    """Its port. It keeps KV in chunks of so many tokens."""
    port, http_port = free_port(), free_port()
    command = [str(Path(sys.executable).parent / "lmcache"), "server", "--port", str(port), "--http-port"]
    command += [str(http_port), "--l1-size-gb", "1", "--eviction-policy", "LRU", "--chunk-size", str(chunk_tokens)]
    command += ["--supported-transfer-mode", "engine_driven", "--disable-observability"]
    environment = os.environ | {"LMCACHE_TRACK_USAGE": "false"}
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_until_ready(server, http_port, log)
        yield port
    finally:
        server.terminate()
        server.wait(30)


def _wait_until_ready(server: "subprocess.Popen[bytes]", http_port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{http_port}/", timeout=5).close()
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"lmcache server did not start:\n{log.read_text()[-3000:]}")
