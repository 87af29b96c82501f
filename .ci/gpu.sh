#!/usr/bin/env bash
# Test and measure the operations on this machine's NVIDIA GPU. Downloads nothing and needs no vLLM: it takes the python3
# on PATH (or the one that VLCACHE_PYTHON names), with PyTorch for CUDA, setuptools and pytest. It builds the libraries,
# unless VLCACHE_LIBRARY_DIR names a folder that has them.
# usage: .ci/gpu.sh [ARGUMENT OF tests/bench/gpu.py ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${VLCACHE_PYTHON:-python3}
"$python" - <<'END'
import sys

missing = []
for module in ("torch", "pytest", "setuptools"):
    try:
        __import__(module)
    except ImportError:
        missing.append(module)
if missing:
    sys.exit(f"gpu: {sys.executable} has no {', '.join(missing)}")
import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu: PyTorch {torch.__version__} of {sys.executable} sees no CUDA device")
END

export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
if [ -z "${VLCACHE_LIBRARY_DIR:-}" ]; then
  # Only the code for this device, unless told otherwise: it takes a third of the time.
  if [ -z "${VLCACHE_CUDA_ARCHS:-}" ]; then
    VLCACHE_CUDA_ARCHS=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    export VLCACHE_CUDA_ARCHS
  fi
  VLCACHE_BUILD_CUDA=1 "$python" setup.py -q build_ext --inplace
fi
exec "$python" tests/bench/gpu.py "$@"
