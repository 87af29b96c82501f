"""The real OpenAI server as a process of its own, for tests of what a user types."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 400


class Server:
    """`vllm serve` with these arguments on a free port of the loopback address."""

    def __init__(self, checkpoint: Path, log: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)]
        command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "tested", *arguments]
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ.copy()
            )

    def wait_until_ready(self) -> "Server":
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                self.get("/health")
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            else:
                return self
        raise RuntimeError(f"the server did not start; end of its log:\n{self.log_text()[-4000:]}")

    def wait_until_gone(self) -> int:
        return self._process.wait(START_TIMEOUT_S)

    def log_text(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            text: str = response.read().decode()
            return text

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def reset(self, cache: str) -> None:
        """Empty one of vLLM's caches, once nothing holds it. The server must run with `VLLM_SERVER_DEV_MODE=1`."""
        deadline = time.monotonic() + 60
        while True:
            with urllib.request.urlopen(f"{self.url}/reset_{cache}_cache", b"", timeout=60) as response:
                told = response.read()
            if not told or json.loads(told)["success"]:
                return
            assert time.monotonic() < deadline, f"the {cache} cache is held"
            time.sleep(0.1)

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
