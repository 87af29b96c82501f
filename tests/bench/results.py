"""What all measurements share: the circumstances of a run, tables, and the distance between two answers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out"
STARTED = time.monotonic()


def say(text: str) -> None:
    """A line of progress, behind the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def warn_when_busy() -> None:
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 4:
        say(f"careful: the load average is {load:.1f} on {cores} cores; with other work around, times mean little")


def circumstances() -> dict[str, Any]:
    """Versions, machine and commit, for the head of every result file."""
    return {
        "time_utc": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("vllm", "torch", "transformers", "vlcache-connector")},
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their content; the first is aligned to the left, the others to the right."""
    lines = [header, ["-" * len(cell) for cell in header], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join(aligned(line) for line in lines)


def gap(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The largest difference between two answers' log-probabilities, over the tokens that both list."""
    common = one.keys() & other.keys()
    return max((abs(one[token] - other[token]) for token in common), default=float("inf"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _commit() -> str | None:
    """Of this folder, or of what it is a copy of, as the environment variable VLCACHE_COMMIT says."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if named := os.environ.get("VLCACHE_COMMIT"):
        return named
    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
