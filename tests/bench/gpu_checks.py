"""The tests of the operations on a GPU, alone and under compute-sanitizer. `gpu.py` runs this."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench.results import ROOT, say

TESTS = "tests/kernels"
MORE_TESTS = "tests/exec/test_upload.py"
TESTS_LIMIT_S = 180
SANITIZER_LIMIT_S = 150
FOUND_SOMETHING = 66  # compute-sanitizer's exit code when it has, as we ask for

# A few of each kind, since a sanitized kernel takes many times as long: every branch of the kernels is in them.
MEMCHECKED = (
    "awkward or nothing_to_move or any_strides or passes_over or past_the_rotary or scaled_pages"
    " or any_number_of_dimensions or any_block_size or runs_of_many or single_query or tile"
)
RACECHECKED = "every_type or runs_of_many or more_queries_than_a_tile or window"

# An order table that points outside of the block, which nobody checks on a GPU: memcheck must report the write.
PLANTED = """
import torch
from vlcache_connector.kernels.ops import PageLayout, load_rows

cache = torch.zeros(1, 8, device="cuda")
order = torch.full((8,), 1 << 28, dtype=torch.int32, device="cuda")
load_rows(torch.zeros(1, 2, 1, 1, 4, device="cuda"), [cache], torch.zeros(1, dtype=torch.int64, device="cuda"),
          PageLayout(1, order=order))
torch.cuda.synchronize()
"""


@dataclass(frozen=True, slots=True)
class Check:
    """What became of one check: "passed", "failed", or why it was not made."""

    name: str
    outcome: str
    seconds: float = 0.0
    summary: str = ""


def run(device: str) -> list[dict[str, Any]]:
    """All checks of the operations on `device`, "cuda" or "cpu" (a rehearsal), side by side. Prints what fails."""
    with ThreadPoolExecutor() as pool:
        kinds = [pool.submit(lambda: [run_tests(device)])]
        if device == "cuda":
            kinds.append(pool.submit(run_sanitizer, pool))
        return [asdict(check) for kind in kinds for check in kind.result()]


def run_tests(device: str) -> Check:
    command = [*pytest_command(f"native-{device}"), MORE_TESTS] + ([] if device == "cuda" else ["-x", "--maxfail=1"])
    return checked("tests", command, {}, TESTS_LIMIT_S, may_stop=False)


def run_sanitizer(pool: ThreadPoolExecutor) -> list[Check]:
    tool = find_sanitizer()
    if tool is None:
        return [skipped("compute-sanitizer", "is not installed: add it to PATH or set CUDA_HOME")]
    # From PyTorch's cache of memory, a tensor is a part of a larger piece, whose end the tool does not see.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    planted = execute([*sanitized(tool, "memcheck"), sys.executable, "-c", PLANTED], uncached, SANITIZER_LIMIT_S)
    if planted.code != FOUND_SOMETHING or "Invalid __global__ write" not in planted.output:
        return [skipped("compute-sanitizer", f"does not see a planted error here: {last_line(planted.output)}")]
    say("compute-sanitizer sees the planted error")
    wanted = {"memcheck": (MEMCHECKED, TESTS), "racecheck": (RACECHECKED, f"{TESTS}/test_attention.py")}
    checks = [
        pool.submit(
            checked,
            name,
            [*sanitized(tool, name), *pytest_command(f"native-cuda and ({tests})", files)],
            uncached,
            SANITIZER_LIMIT_S,
        )
        for name, (tests, files) in wanted.items()
    ]
    return [check.result() for check in checks]


def sanitized(tool: str, name: str) -> list[str]:
    return [tool, "--tool", name, "--error-exitcode", str(FOUND_SOMETHING), "--print-limit", "5"]


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = [shutil.which("compute-sanitizer"), *(shutil.which(f"{place}/bin/compute-sanitizer") for place in places)]
    return next(filter(None, found), None)


def pytest_command(wanted: str, files: str = TESTS) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, files]


@dataclass(frozen=True, slots=True)
class Executed:
    code: int | None  # None: it took too long
    output: str
    seconds: float


def environment(more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Of processes that import the package from this folder."""
    paths = filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def execute(command: Sequence[str], more: Mapping[str, str], limit_s: float) -> Executed:
    started = time.monotonic()
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(more), text=True, **options) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also what it has started: that holds the pipe open
            output, code = process.communicate()[0], None
    return Executed(code, output, time.monotonic() - started)


def checked(name: str, command: Sequence[str], more: Mapping[str, str], limit_s: float, may_stop: bool = True) -> Check:
    """`may_stop`: to be stopped for taking too long is no failure, as far as nothing was found."""
    say(f"{name} runs, {limit_s:.0f} s at most")
    done = execute(command, more, limit_s)
    summary = next((line for line in reversed(done.output.splitlines()) if re.search(r"\d+ passed|failed", line)), "")
    if done.code == 0 and " passed" in summary:
        outcome = "passed"
    elif done.code is None and may_stop and not has_findings(done):
        outcome = f"stopped after {limit_s:.0f} s, nothing found until then"
    else:
        outcome = "failed"
        print(done.output[-6000:], flush=True)
    say(f"{name}: {outcome}; {summary or last_line(done.output)}")
    return Check(name, outcome, round(done.seconds, 1), summary)


def has_findings(done: Executed) -> bool:
    return "=========" in done.output and bool(re.search(r"Invalid|Error:|Warning:|hazard", done.output))


def skipped(name: str, why: str) -> Check:
    say(f"{name} {why}")
    return Check(name, why)


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(no output)"


def nvcc_version() -> str | None:
    places = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc", "nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\S+),", answer.stdout)
    return found[1] if found else None


def driver_version() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        version = Path("/proc/driver/nvidia/version")
        return version.read_text().splitlines()[0] if version.exists() else None
    return answer.stdout.split("\n")[0].strip() or None
