"""How setup.py finds compilers and PyTorch, compiles what changed, and links."""

from __future__ import annotations

import hashlib
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

OLDEST_TORCH = (2, 11)
EXPORTS = Path("csrc/exports.map")
OBJECTS = Path("build/objects")  # not where setuptools wants them: that is another place each time for pip
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]


class BuildError(Exception):
    """A library cannot be built; the message is for whoever installs."""


class MissingToolError(BuildError):
    """Something that it is built with is not here."""


def flags(name: str) -> list[str]:
    """Compiler arguments in the environment variable `name`."""
    return shlex.split(os.environ.get(name, ""))


def cxx() -> list[str]:
    compiler = flags("CXX") or ["g++"]
    if shutil.which(compiler[0]) is None:
        raise MissingToolError(f"The C++ compiler {compiler[0]} is not there: install g++ or set CXX.")
    return compiler


def run(command: list[str], what: str) -> str:
    """Run a tool and return what it says; `BuildError` with that when it fails."""
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if answer.returncode:
        raise BuildError(f"{what} failed:\n{shlex.join(command)}\n{answer.stdout}")
    return answer.stdout


@dataclass(frozen=True)
class Torch:
    """The PyTorch to build for, looked at without importing it (which takes seconds)."""

    folder: Path
    cuda: str | None

    @classmethod
    def find(cls) -> Torch:
        spec = find_spec("torch")
        # pip hides the environment it installs into from the build, but not where that is.
        places = [*(spec.submodule_search_locations or [] if spec else []), f"{sysconfig.get_path('purelib')}/torch"]
        folder = next((Path(place) for place in places if Path(place, "version.py").exists()), None)
        if folder is None:
            raise MissingToolError(
                f"PyTorch is not there for {sys.executable}. Install it first, or build with --no-build-isolation. "
                "With VLCACHE_BUILD_CPU=0 and VLCACHE_BUILD_CUDA=0 no native library is built."
            )
        facts = runpy.run_path(str(folder / "version.py"))
        if tuple(map(int, facts["__version__"].split(".")[:2])) < OLDEST_TORCH:
            raise MissingToolError(f"PyTorch {facts['__version__']} is too old, 2.11 or newer is needed.")
        return cls(folder, facts["cuda"])

    @property
    def compile_flags(self) -> list[str]:
        return ["-isystem", str(self.folder / "include"), *STABLE_ABI]

    @property
    def link_flags(self) -> list[str]:
        return [f"-L{self.folder / 'lib'}", "-ltorch_cpu"]

    def cuda_link_flags(self, compiler: list[str]) -> list[str]:
        """Where this PyTorch has no CUDA library, an empty one of the same name stands in; the one that is there when
        ours is loaded has the symbols.
        """
        arguments = [*self.link_flags, "-Wl,--push-state,--no-as-needed", "-ltorch_cuda", "-Wl,--pop-state"]
        if (self.folder / "lib" / "libtorch_cuda.so").exists():
            return arguments
        stand_in = OBJECTS / "libtorch_cuda.so"
        empty = ["-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{stand_in.name}", "-o", str(stand_in)]
        run([*compiler, *empty], f"linking {stand_in}")
        return [f"-L{OBJECTS}", *arguments]


@dataclass(frozen=True)
class CudaToolkit:
    nvcc: str
    folder: Path
    version: str

    @classmethod
    def find(cls) -> CudaToolkit:
        home = os.environ.get("CUDA_HOME")
        places = [f"{home}/bin/nvcc"] if home else ["/usr/local/cuda/bin/nvcc", "nvcc"]
        nvcc = next(filter(None, map(shutil.which, places)), None)
        if nvcc is None:
            raise MissingToolError(f"CUDA's compiler is not there ({', '.join(places)}).")
        # nvcc may be a script that calls one elsewhere: the compiler itself says where it lives.
        top = re.search(r"^#\$ TOP=(.*)$", run([nvcc, "--dryrun", "-x", "cu", os.devnull], "asking nvcc"), re.MULTILINE)
        version = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"], "asking nvcc"))
        if top is None or version is None:
            raise MissingToolError(f"{nvcc} does not answer as nvcc does.")
        return cls(nvcc, Path(top[1]).resolve(), version[1])

    def static_runtime(self) -> Path:
        """A library that is linked with this one needs no CUDA folder where it runs."""
        for place in ("lib64", "lib", "targets/*/lib"):
            for path in self.folder.glob(f"{place}/libcudart_static.a"):
                return path
        raise MissingToolError(f"libcudart_static.a is not in {self.folder}.")


@dataclass(frozen=True)
class Unit:
    """A translation unit. `check` looks at what the compiler said; it raises `BuildError` or returns what to show."""

    source: Path
    command: tuple[str, ...]
    check: Callable[[str], str] = str.strip

    @property
    def target(self) -> Path:
        """Each way to compile a file has its own place, so that switching between them compiles nothing again."""
        way = hashlib.sha256(repr((self.command, self.check.__name__)).encode()).hexdigest()
        return OBJECTS / f"{self.source.stem}-{way[:12]}.o"

    def _inputs(self, unchanged_since: float) -> str:
        """Digest of all files that the last compilation read; empty where that is not known."""
        names = self.target.with_suffix(".d")
        if not names.exists() or not self.target.exists():
            return ""
        digest = hashlib.sha256()
        for path in map(Path, names.read_text().partition(":")[2].replace("\\\n", " ").split()):
            if not path.exists() or path.stat().st_mtime > unchanged_since:
                return ""
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def compile(self) -> None:
        """Compile unless nothing changed since the last time."""
        stamp = self.target.with_suffix(".inputs")
        if stamp.exists() and stamp.read_text() == self._inputs(math.inf) != "":
            return
        began = time.time()
        results = ["-MMD", "-MF", str(self.target.with_suffix(".d")), "-o", str(self.target)]
        said = run([*self.command, "-c", str(self.source), *results], f"compiling {self.source}")
        if message := self.check(said):
            sys.stderr.write(f"{message}\n")
        stamp.write_text(self._inputs(began))  # empty when someone edits meanwhile


def compile_all(units: list[Unit], jobs: int) -> None:
    """Compile in parallel. Of each source that fails, the first complaint is raised."""
    errors: dict[Path, str] = {}

    def compile_one(unit: Unit) -> None:
        try:
            unit.compile()
        except BuildError as error:
            errors.setdefault(unit.source, str(error))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, units))
    if errors:
        raise BuildError("\n".join(errors.values()))


def link(compiler: list[str], units: list[Unit], libraries: list[str], target: Path) -> None:
    """Link to a new file and put it in place of the old one, which may be in use. The standard library comes first:
    PyTorch exports copies of some of its functions.
    """
    new = target.with_suffix(".new")
    inputs = [*(str(unit.target) for unit in units), f"-Wl,--version-script={EXPORTS}", "-lstdc++", *libraries]
    run([*compiler, "-shared", *inputs, *flags("LDFLAGS"), "-o", str(new)], f"linking {target}")
    new.replace(target)


def spills(ptxas: str) -> list[str]:
    """The kernels that need more registers than there are, of the output of `ptxas -v`."""
    entries = re.findall(r"entry function '(\S+)' for '(\S+)'\n.*\n.*?(\d+) bytes spill stores, (\d+) bytes", ptxas)
    return [
        f"{name} for {architecture}: {stores} bytes stored, {loads} loaded"
        for name, architecture, stores, loads in entries
        if (stores, loads) != ("0", "0")
    ]
