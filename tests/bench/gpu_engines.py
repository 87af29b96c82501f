"""Runs of `gpu_engine.py`, each in a process of its own. They start side by side, while other things are checked, and
measure one after the other. `gpu.py` uses this.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from bench.gpu_checks import environment
from bench.results import ROOT, say

# Name -> what to run. The first as `vllm serve` would, the others for other ways to run it.
RUNS = {
    "8b": [],
    "8b, the engine's attention": ["--attention", "engine"],
    "eager": ["--model", "tiny", "--eager", "--no-ttft"],
    "V1 runner": ["--model", "tiny", "--runner", "v1", "--no-ttft"],
    "V1 runner, eager, our attention": [
        *("--model", "tiny", "--runner", "v1", "--eager", "--attention", "vlcache", "--no-ttft"),
    ],
}
REHEARSED = {"eager": ["--model", "tiny", "--runner", "v1", "--eager", "--attention", "vlcache"]}
START_LIMIT_S = 150
TIMES_LIMIT_S = 150  # of one run, once it is its turn
SHOWN = 6000  # characters of a run's output


class Engines:
    """The runs. `turn`: the file whose lock they want before they measure; `folder`: for their output and results."""

    def __init__(self, runs: dict[str, list[str]], folder: Path, turn: Path) -> None:
        self._folder = folder
        self._started = time.monotonic()
        self._processes = {name: self._start(name, [*options, "--turn", str(turn)]) for name, options in runs.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody goes on behind us."""
        for name, process in self._processes.items():
            if process.poll() is None:
                self._stop(name)

    def wait_until_started(self) -> None:
        """Returns when each has seen whether it is right, or has ended; stops those that take too long."""
        deadline = self._started + START_LIMIT_S
        waiting = dict(self._processes)
        while waiting:
            for name, process in list(waiting.items()):
                if process.poll() is not None or self._results(name).exists():
                    say(f"engine {name!r}: " + ("ended" if process.poll() is not None else "is up and checked"))
                    del waiting[name]
                elif time.monotonic() > deadline:
                    self._stop(name)
            time.sleep(0.2)

    def collect(self) -> dict[str, Any]:
        """What each of them found, once all have ended."""
        deadline = time.monotonic() + TIMES_LIMIT_S * len(self._processes)
        found = {}
        for name, process in self._processes.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._stop(name)
            print(f"\n--- engine {name!r}\n{self._log(name).read_text()[-SHOWN:]}", flush=True)
            results = self._results(name)
            measured = json.loads(results.read_text()) if results.exists() else {}
            outcome = {0: "passed", -signal.SIGKILL: "took too long"}.get(process.returncode, "failed")
            found[name] = {"outcome": outcome, **measured}
            say(f"engine {name!r}: {outcome}")
        return found

    def _start(self, name: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
        script = str(ROOT / "tests" / "bench" / "gpu_engine.py")
        command = [sys.executable, script, *options, "--results", str(self._results(name))]
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _stop(self, name: str) -> None:
        process = self._processes[name]
        os.killpg(process.pid, signal.SIGKILL)  # also what it has started
        process.wait()

    def _results(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"
