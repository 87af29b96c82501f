"""setup.py: what it compiles, when, with what, and what it packs; mostly on a tiny source tree, which takes seconds."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from toolchain import CudaToolkit, MissingToolError, Torch, spills

ROOT = Path(__file__).parents[2]
PACKING = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
LIBRARY = Path("src/vlcache_connector/_cpu.so")

# All copies of a kernel call `width`, an inline function that breaks the rule that its definitions are the same.
KERNEL = """
#include "wide.h"
namespace vlcache { namespace VLCACHE_ISA { int width() { return ::width<int>() * TIMES; } } }
"""
WIDE = """
template <typename T> __attribute__((noinline)) int width() { return 8 * sizeof(T)
#if defined(__AVX512F__)
  * 4
#elif defined(__AVX2__)
  * 2
#endif
  ; }
#define TIMES 1
"""
CALLS = """
#include "cpu/isa.h"
namespace vlcache { namespace generic { int width(); } namespace NEWEST { int width(); } }
extern "C" __attribute__((visibility("default"))) int width_of_generic() { return vlcache::generic::width(); }
extern "C" __attribute__((visibility("default"))) int width_of_newest() { return vlcache::NEWEST::width(); }
"""
NEWEST = "avx512" if platform.machine() == "x86_64" else "generic"

SPILLING = """
__global__ void __launch_bounds__(1024, 2) keep_all(float* x) {
  float kept[100];
  #pragma unroll
  for (int i = 0; i < 100; ++i) kept[i] = x[i * threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 100; ++i) x[i * threadIdx.x + 1] = kept[99 - i] * kept[i];
}
"""


def has_nvcc() -> bool:
    try:
        CudaToolkit.find()
    except MissingToolError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The packaging files, an almost empty package, and one kernel."""
    for name in (*PACKING, "csrc/toolchain.py", "csrc/cpu/isa.h", "src/vlcache_connector/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc/cpu/width_kernels.cpp").write_text(KERNEL)
    (tmp_path / "csrc/cpu/calls.cpp").write_text(CALLS.replace("NEWEST", NEWEST))
    (tmp_path / "csrc/wide.h").write_text(WIDE)
    exports = (ROOT / "csrc/exports.map").read_text()
    (tmp_path / "csrc/exports.map").write_text(exports.replace("vlcache_*", "width_of_*"))
    return tmp_path


def setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py in `tree` without any of our own settings except `environment`."""
    ours = ("VLCACHE_", "CXX", "LDFLAGS", "CUDA_HOME")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "setup.py", *(arguments or ("build_ext", "--inplace"))]
    answer = subprocess.run(command, cwd=tree, env={**clean, **environment}, text=True, capture_output=True)
    answer.stderr += answer.stdout
    return answer


def build(tree: Path, **environment: str) -> str:
    """What a build that succeeds says."""
    answer = setup(tree, VLCACHE_BUILD_CUDA=environment.pop("VLCACHE_BUILD_CUDA", "0"), **environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


def compiled(tree: Path) -> dict[str, int]:
    """When each object was written."""
    return {path.name: path.stat().st_mtime_ns for path in (tree / "build" / "objects").glob("*.o")}


def call(library: Path, function: str) -> int:
    """Call a function in a process that has PyTorch's symbols, which a test process may have in another version."""
    code = f"import ctypes, sys, torch; print(ctypes.CDLL(sys.argv[1]).{function}())"
    answer = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=True)
    return int(answer.stdout)


def test_each_kernel_file_is_compiled_once_for_each_instruction_set_and_the_rest_once(tree: Path) -> None:
    build(tree)
    names = [name.partition("-")[0] for name in compiled(tree)]
    assert sorted(set(names)) == ["calls", "width_kernels"]
    assert names.count("width_kernels") == (3 if platform.machine() == "x86_64" else 1)
    assert names.count("calls") == 1


def test_no_copy_of_a_kernel_is_given_an_inline_function_of_a_higher_instruction_set(tree: Path) -> None:
    """A processor without AVX-512 would die of it."""
    build(tree)
    assert call(tree / LIBRARY, "width_of_generic") == 32
    assert call(tree / LIBRARY, "width_of_newest") == 32


def test_only_what_a_change_concerns_is_compiled_again(tree: Path) -> None:
    build(tree)
    first = compiled(tree)
    build(tree)
    assert compiled(tree) == first
    (tree / "csrc/wide.h").write_text(WIDE.replace("TIMES 1", "TIMES 3"))
    build(tree)
    second = compiled(tree)
    assert {name for name in first if second[name] != first[name]} == {n for n in first if n.startswith("width")}
    assert call(tree / LIBRARY, "width_of_generic") == 96


def test_other_compiler_flags_leave_what_was_compiled_before_in_place(tree: Path) -> None:
    build(tree)
    first = compiled(tree)
    build(tree, CXXFLAGS="-DTIMES=7 -Wno-error")
    assert first.items() < compiled(tree).items()


def test_a_file_that_does_not_compile_fails_the_build_with_the_compilers_words_once(tree: Path) -> None:
    (tree / "csrc/wide.h").write_text("template <typename T> int width() { return nothing; }\n#define TIMES 1\n")
    answer = setup(tree, VLCACHE_BUILD_CUDA="0", LC_ALL="C")
    assert answer.returncode
    assert answer.stderr.count("'nothing' was not declared") == 1
    assert "Traceback" not in answer.stderr
    assert not (tree / LIBRARY).exists()


def test_a_symbol_that_nobody_defines_fails_the_build(tree: Path) -> None:
    (tree / "csrc/cpu/width_kernels.cpp").write_text("")
    answer = setup(tree, VLCACHE_BUILD_CUDA="0")
    assert answer.returncode
    assert "undefined reference" in answer.stderr


def test_without_a_compiler_the_package_is_built_without_library_and_says_so(tree: Path) -> None:
    said = build(tree, CXX="no-such-compiler")
    assert "no-such-compiler is not there: install g++" in said
    assert "slower" in said
    assert not (tree / LIBRARY).exists()
    answer = setup(tree, CXX="no-such-compiler", VLCACHE_BUILD_CPU="1")
    assert answer.returncode
    assert "no-such-compiler is not there: install g++" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_library_that_is_no_longer_wanted_does_not_stay(tree: Path) -> None:
    build(tree)
    assert (tree / LIBRARY).exists()
    build(tree, VLCACHE_BUILD_CPU="0")
    assert list(tree.rglob("_cpu.so")) == []


def test_a_setting_that_means_nothing_is_an_error(tree: Path) -> None:
    answer = setup(tree, VLCACHE_BUILD_CUDA="yes")
    assert answer.returncode
    assert "VLCACHE_BUILD_CUDA=yes: it must be 0, 1 or auto" in answer.stderr


def test_pytorch_is_found_in_the_environment_that_pip_hides_from_a_build() -> None:
    code = (
        "import sys; from importlib.util import find_spec\n"
        "sys.path = ['csrc'] + [place for place in sys.path if 'site-packages' not in place]\n"
        "from toolchain import Torch; print(find_spec('torch'), Torch.find().folder)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["None", str(Torch.find().folder)]


def test_auto_builds_no_cuda_library_for_a_pytorch_or_nvcc_that_do_not_fit(tree: Path) -> None:
    said = build(tree, VLCACHE_BUILD_CUDA="auto", CUDA_HOME=str(tree))
    assert "no CUDA library: CUDA's compiler is not there" in said
    answer = setup(tree, VLCACHE_BUILD_CUDA="1", CUDA_HOME=str(tree))
    assert answer.returncode
    assert f"CUDA's compiler is not there ({tree}/bin/nvcc)" in answer.stderr


@needs_nvcc
def test_a_kernel_that_spills_registers_is_a_warning_and_with_strict_an_error(tree: Path) -> None:
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/keep_op.cu").write_text(SPILLING)
    wish = {"VLCACHE_BUILD_CPU": "0", "VLCACHE_BUILD_CUDA": "1", "VLCACHE_CUDA_ARCHS": "80;90"}
    said = build(tree, **wish)
    for architecture in ("sm_80", "sm_90"):
        assert f"_Z8keep_allPf for {architecture}: " in said
    assert (tree / LIBRARY.with_name("_cuda.so")).exists()
    answer = setup(tree, **wish, VLCACHE_STRICT="1")
    assert answer.returncode
    assert "kernels spill registers" in answer.stderr


@needs_nvcc
def test_a_cuda_library_is_linked_where_pytorch_has_no_cuda_and_holds_its_own_runtime(tree: Path) -> None:
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/nothing_op.cu").write_text("__global__ void nothing() {}\nvoid run() { nothing<<<1, 1>>>(); }\n")
    build(tree, VLCACHE_BUILD_CPU="0", VLCACHE_BUILD_CUDA="1", VLCACHE_STRICT="1", VLCACHE_CUDA_ARCHS="90")
    library = tree / LIBRARY.with_name("_cuda.so")
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cuda.so]" in needed
    assert "libcudart" not in needed


def test_spills_are_read_from_what_the_assembler_says() -> None:
    said = (
        "ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1aPf\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1bPf\n"
        "    40 bytes stack frame, 0 bytes spill stores, 12 bytes spill loads\n"
    )
    assert spills(said) == ["_Z1bPf for sm_90: 0 bytes stored, 12 loaded"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this source tree. Objects that were compiled here already are copied as well."""
    tree = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("src", "csrc", "build/objects"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in PACKING:
        shutil.copy(ROOT / name, tree / name)
    (tree / "src/vlcache_connector/_left_over.so").write_bytes(b"of an earlier build")
    answer = setup(tree, "-q", "bdist_wheel", VLCACHE_BUILD_CPU="1", VLCACHE_BUILD_CUDA="0")
    assert answer.returncode == 0, answer.stderr
    (found,) = (tree / "dist").iterdir()
    return found


def test_the_wheel_holds_the_package_and_its_cpu_library_and_serves_every_python(wheel: Path) -> None:
    assert wheel.name.startswith("vlcache_connector-")
    assert f"-py3-none-linux_{platform.machine()}.whl" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    inside = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert inside == sources | {"vlcache_connector/py.typed", "vlcache_connector/_cpu.so"}


def test_the_library_of_the_wheel_loads_where_the_wheel_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from vlcache_connector.kernels import library; print(library.library_report()[0].path, library.cpu_isa())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    path, isa = answer.stdout.split()
    assert path == str(tmp_path / "vlcache_connector" / "_cpu.so")
    assert isa in ("generic", "avx2", "avx512")
