"""Builds the native libraries of `csrc/` by calling the compilers itself: plain shared objects without any Python in
them, so one file serves every CPython, and `torch.ops.load_library` loads it.

- `_cpu.so`: `csrc/cpu/*_kernels.cpp` once for each instruction set, the other `.cpp` once.
- `_cuda.so`: `csrc/cuda/*.cu`. It takes nvcc, but neither a GPU nor a PyTorch that was built for CUDA.

Settings, all in the environment:

- VLCACHE_BUILD_CPU: `0` never, `1` always, `auto` (default): without a C++ compiler there is a warning and no library.
- VLCACHE_BUILD_CUDA: `0` never, `1` always, `auto` (default): when PyTorch was built for CUDA and nvcc is of its major
  version.
- VLCACHE_CUDA_ARCHS: `80;90;100` by default. VLCACHE_STRICT=1: a kernel that spills registers is an error.
- CXX, CXXFLAGS, LDFLAGS, CUDA_HOME: as everywhere.
"""

import fcntl
import logging
import os
import platform
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools {setuptools.__version__} is too old to install this: pip install 'setuptools>=77.0.3'")
from setuptools.command.bdist_wheel import bdist_wheel

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from toolchain import (
    OBJECTS,
    BuildError,
    CudaToolkit,
    MissingToolError,
    Torch,
    Unit,
    compile_all,
    cxx,
    flags,
    link,
    spills,
)

CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Icsrc"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS: dict[str, list[str]] = {"generic": []}
if platform.machine() == "x86_64":
    ISAS |= {"avx2": AVX2, "avx512": AVX512}
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "-DUSE_CUDA", "-Icsrc"]
CUDA_ARCHS = "80;90;100"


def setting(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("0", "1", "auto"):
        raise OptionError(f"{name}={value}: it must be 0, 1 or auto.")
    return value


def architecture_flags() -> list[str]:
    """Machine code for each architecture; for the newest also code that the drivers of later GPUs translate."""
    names = (os.environ.get("VLCACHE_CUDA_ARCHS") or CUDA_ARCHS).split(";")
    newest = max(names, key=lambda name: int(name.rstrip("af")))
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def warn_of_spills(said: str) -> str:
    return "\n".join(["warning: kernels spill registers:", *spilled]) if (spilled := spills(said)) else ""


def refuse_spills(said: str) -> str:
    if spilled := spills(said):
        raise BuildError("\n".join(["kernels spill registers:", *spilled]))
    return ""


class BuildLibraries(build_ext):
    """setuptools' command, which knows where results go. How they are made is ours."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with (OBJECTS / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self.extensions = [extension for extension in self.extensions if self.build_library(extension)]
            except BuildError as error:
                raise CompileError(str(error)) from None

    def build_library(self, extension: Extension) -> bool:
        """Returns whether the library is there now."""
        build_py = self.get_finalized_command("build_py")
        beside_sources, target = map(Path, self._get_inplace_equivalent(build_py, extension))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (self.build_cpu(target) if target.stem == "_cpu" else self.build_cuda(target)):
            target.unlink(missing_ok=True)  # of an earlier run with other settings: it would be packed
            if self.inplace:
                beside_sources.unlink(missing_ok=True)
            return False
        if self.inplace:
            new = shutil.copy2(target, beside_sources.with_suffix(f".{os.getpid()}.so"))
            new.replace(beside_sources)  # at once: the old one may be in use
        return True

    def build_cpu(self, target: Path) -> bool:
        if (wish := setting("VLCACHE_BUILD_CPU")) == "0":
            return False
        try:
            compiler = cxx()
        except MissingToolError as problem:
            if wish == "1":
                raise
            self.announce(f"warning: {problem} Without it KV is moved by slower PyTorch operations.", logging.WARNING)
            return False
        torch = Torch.find()
        kernels = sorted(Path("csrc/cpu").glob("*_kernels.cpp"))
        others = sorted(set(Path("csrc/cpu").glob("*.cpp")) - set(kernels))
        common = (*compiler, *CXX_FLAGS, *torch.compile_flags)
        units = [Unit(path, (*common, *flags("CXXFLAGS"))) for path in others]
        # The linker keeps the first copy of an inline function that several units define. From the lowest instruction
        # set to the highest, so that no unit gets a copy that uses more than the unit itself does.
        units += [
            Unit(path, (*common, f"-DVLCACHE_ISA={isa}", *options, *flags("CXXFLAGS")))
            for isa, options in ISAS.items()
            for path in kernels
        ]
        compile_all(units, self.jobs)
        link([*compiler, *flags("CXXFLAGS")], units, [*torch.link_flags, "-Wl,-z,defs"], target)
        return True

    def build_cuda(self, target: Path) -> bool:
        if (wish := setting("VLCACHE_BUILD_CUDA")) == "0":
            return False
        try:
            torch, toolkit, compiler = Torch.find(), CudaToolkit.find(), cxx()
            if wish == "auto" and (torch.cuda or "none").split(".")[0] != toolkit.version.split(".")[0]:
                raise MissingToolError(f"PyTorch's CUDA is {torch.cuda}, nvcc's {toolkit.version}.")
            runtime = toolkit.static_runtime()
        except MissingToolError as problem:
            if wish == "1":
                raise
            self.announce(f"no CUDA library: {problem}", logging.INFO)
            return False
        check = refuse_spills if os.environ.get("VLCACHE_STRICT") == "1" else warn_of_spills
        command = (toolkit.nvcc, "-ccbin", compiler[0], *NVCC_FLAGS, *architecture_flags(), *torch.compile_flags)
        units = [Unit(path, command, check) for path in sorted(Path("csrc/cuda").glob("*.cu"))]
        compile_all(units, self.jobs)
        libraries = [*torch.cuda_link_flags(compiler), str(runtime), "-Wl,--exclude-libs,libcudart_static.a"]
        link(compiler, units, [*libraries, "-lrt", "-lpthread", "-ldl"], target)
        return True

    @property
    def jobs(self) -> int:
        return int(self.parallel or os.cpu_count() or 1)


class NameWheel(bdist_wheel):
    """The libraries know nothing of Python: one wheel for each platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":  # so it is for pip, too
    setup(
        ext_modules=[Extension(f"vlcache_connector.{name}", []) for name in ("_cpu", "_cuda")],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": NameWheel},
    )
