"""Finds and loads what setup.py compiled from `csrc/`. Importing `ops` does it, in every process that moves KV.

Nothing here is an error: what has no library runs as plain PyTorch, and the log says so in one line.

Environment: VLCACHE_LIBRARY_DIR, a folder to load from instead of this package (for libraries that were built with
other compiler flags).
"""

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(f"vllm.{__name__}")  # under the name whose level and format vLLM sets

_REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."
_CPU_ISAS = ("generic", "avx2", "avx512")


@dataclass(frozen=True, slots=True)
class LibraryState:
    """What became of one library. `problem` is empty or a sentence with advice."""

    device: str  # dispatch key: CPU or CUDA
    path: Path
    is_needed: bool
    is_loaded: bool
    problem: str = ""


def folder() -> Path:
    return Path(os.environ.get("VLCACHE_LIBRARY_DIR") or Path(__file__).parents[1])


def load_libraries() -> frozenset[str]:
    """Load what is there, once per process. Returns the dispatch keys ("CPU", "CUDA") that have native code."""
    return frozenset(state.device for state in library_report() if state.is_loaded)


@cache
def library_report() -> tuple[LibraryState, ...]:
    """What became of each library; loads them on first use and logs what is missing."""
    states = (_load_cpu(), _load_cuda())
    for state in states:
        if state.problem:
            logger.warning("%s; its operations on the %s run as slower PyTorch.", state.problem, state.device)
    return states


def cpu_isa() -> str | None:
    """The instruction set whose copies of the CPU kernels are called: generic, avx2 or avx512; None without library."""
    state = library_report()[0]
    if not state.is_loaded:
        return None
    function = ctypes.CDLL(str(state.path)).vlcache_cpu_isa
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def _load_cpu() -> LibraryState:
    path = folder() / "_cpu.so"
    if (wish := os.environ.get("VLCACHE_CPU_ISA")) and wish not in _CPU_ISAS:
        logger.warning("VLCACHE_CPU_ISA=%s is ignored: it must be one of %s.", wish, ", ".join(_CPU_ISAS))
    if path.exists():
        return _load("CPU", path)
    return LibraryState(
        "CPU", path, True, False, f"{path} is missing (install g++, then in the source folder: {_REBUILD})"
    )


def _load_cuda() -> LibraryState:
    """CUDA code without a CUDA build of PyTorch is never loaded: the symbols that it needs are not there."""
    path = folder() / "_cuda.so"
    if torch.version.cuda is None:
        return LibraryState("CUDA", path, False, False)
    if path.exists():
        return _load("CUDA", path)
    # Asked only here: counting devices does not start CUDA where NVML answers, but there is no need to rely on that.
    is_needed = torch.cuda.device_count() > 0
    advice = f"{path} is missing (with nvcc {torch.version.cuda.split('.')[0]}.x, in the source folder: "
    problem = f"{advice}VLCACHE_BUILD_CUDA=1 {_REBUILD})" if is_needed else ""
    return LibraryState("CUDA", path, is_needed, False, problem)


def _load(device: str, path: Path) -> LibraryState:
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        problem = f"{path} does not load beside PyTorch {torch.__version__}: {cause} (build it again: {_REBUILD})"
        return LibraryState(device, path, True, False, problem)
    return LibraryState(device, path, True, True)
