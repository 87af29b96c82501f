"""Run the tests of the operations on a CPU library that was compiled with AddressSanitizer and
UndefinedBehaviorSanitizer, for each instruction set that this processor has. `make sanitize` runs it.

First it plants one error of each kind and sees it reported: silence is worth nothing otherwise.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path("build/sanitize").absolute()
LIBRARIES = FOLDER / "vlcache_connector"
FLAGS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1 -w"
CXX = os.environ.get("CXX", "g++")

PLANTED = """
extern "C" float element(const float* tensor, long i) { return tensor[i]; }
extern "C" int next(int i) { return i + 1; }
"""
CALL_PLANTED = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.element.argtypes = [ctypes.c_void_p, ctypes.c_long]
four_floats = torch.zeros(4)
tensor = four_floats.data_ptr()
"""
# (what Python runs beside the planted library, what must be reported; nothing: it must pass)
EXPECTED = (
    ("library.element(tensor, 3); library.next(1)", ""),
    ("library.element(tensor, 4)", "heap-buffer-overflow"),
    ("library.next(2**31 - 1)", "signed integer overflow"),
)


def preload() -> str:
    """AddressSanitizer comes before everything else; it looks for C++ exceptions at once, so their library is next."""
    names = ("libasan.so", "libstdc++.so.6")
    return " ".join(
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    )


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    sanitized = {
        "LD_PRELOAD": preload(),
        "ASAN_OPTIONS": "detect_leaks=0",  # what Python and PyTorch keep until they exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "VLCACHE_LIBRARY_DIR": str(LIBRARIES),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**os.environ, **sanitized, **environment}, capture_output=True, text=True)


def check_that_errors_are_seen() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, library = FOLDER / "planted.cpp", FOLDER / "planted.so"
    source.write_text(PLANTED)
    subprocess.run([CXX, "-shared", "-fPIC", *FLAGS.split(), str(source), "-o", str(library)], check=True)
    for statement, report in EXPECTED:
        answer = run(["-c", CALL_PLANTED + statement, str(library)])
        if bool(answer.returncode) != bool(report) or report not in answer.stderr:
            sys.exit(f"sanitize: {statement} should report {report or 'nothing'!r}, but said:\n{answer.stderr[-3000:]}")


def build() -> None:
    flags = {"CXXFLAGS": FLAGS, "VLCACHE_BUILD_CPU": "1", "VLCACHE_BUILD_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(FOLDER)]
    if subprocess.run(command, env={**os.environ, **flags}).returncode:
        sys.exit("sanitize: the library does not compile")


def isas() -> list[str]:
    """Instruction sets to test: what is asked for, as long as the library does not choose a smaller one."""
    code = "import json; from vlcache_connector.kernels.library import cpu_isa; print(json.dumps(cpu_isa()))"
    found = []
    for name in ("generic", "avx2", "avx512"):
        answer = run(["-c", code], VLCACHE_CPU_ISA=name)
        if answer.returncode:
            sys.exit(f"sanitize: the library does not load:\n{answer.stderr[-3000:]}")
        if json.loads(answer.stdout) == name:
            found.append(name)
    return found


def test(isa: str) -> subprocess.CompletedProcess[str]:
    """The tests that call compiled operations; those of plain PyTorch and of the build have nothing to do here."""
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native-cpu", "tests/kernels"]
    return run(tests, VLCACHE_CPU_ISA=isa)


def main() -> None:
    start = time.perf_counter()
    check_that_errors_are_seen()
    build()
    with ThreadPoolExecutor(2) as pool:
        for isa, answer in zip(names := isas(), pool.map(test, names), strict=True):
            if answer.returncode:
                sys.exit(f"{answer.stdout[-6000:]}\n{answer.stderr[-6000:]}\nsanitize: failed with {isa} kernels")
            print(f"sanitize: {isa}: {answer.stdout.strip().splitlines()[-1]}", flush=True)
    print(f"sanitize: nothing found, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
