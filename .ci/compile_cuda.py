"""Compile and link the CUDA library for all architectures, on a machine without a GPU. Spilled registers are an error.

`make cuda` runs it. Without nvcc it fetches one from PyPI into `build/`; where that fails it says so and is content.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, "csrc")
from toolchain import CudaToolkit, MissingToolError

FETCHED = Path("build/cuda-toolkit").absolute()
# Pinned together: of different versions, the parts do not fit each other.
PARTS = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")]
LIBRARY = Path("build/cuda/vlcache_connector/_cuda.so")


def toolkit_version() -> str | None:
    """Version of nvcc; points CUDA_HOME at a fetched one where there is no other."""
    try:
        return CudaToolkit.find().version
    except MissingToolError as problem:
        home = FETCHED / "nvidia" / "cu13"
        if not (home / "bin" / "nvcc").exists():
            print(f"cuda: {problem} Fetching one from PyPI.", flush=True)
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(FETCHED)]
            subprocess.run([*pip, *PARTS], capture_output=True)
        os.environ["CUDA_HOME"] = str(home)
    try:
        return CudaToolkit.find().version
    except MissingToolError:
        return None


def own_symbols_that_are_missing() -> list[str]:
    """The linker cannot tell them from PyTorch's, which are there only where CUDA is."""
    answer = subprocess.run(["nm", "-DC", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=1)[1] for line in answer.stdout.splitlines() if "vlcache" in line]


def main() -> None:
    start = time.perf_counter()
    version = toolkit_version()
    if version is None:
        print("cuda: not compiled: there is no nvcc here and none could be fetched from PyPI")
        return
    wishes = {"VLCACHE_BUILD_CPU": "0", "VLCACHE_BUILD_CUDA": "1", "VLCACHE_STRICT": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/cuda"]
    if subprocess.run(command, env={**os.environ, **wishes}).returncode:
        sys.exit("cuda: failed")
    if missing := own_symbols_that_are_missing():
        sys.exit("cuda: used but nowhere defined: " + ", ".join(missing))
    print(f"cuda: compiled and linked with nvcc {version}, no register spills, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
