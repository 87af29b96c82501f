"""Each copy of the CPU kernels computes the same as the plain-PyTorch twin, bit for bit."""

import os
import subprocess
import sys

import pytest

from kernels.conftest import load_by_twin, save_by_twin, shift_by_twin
from kernels.isa_probe import digest


@pytest.fixture(scope="module")
def digest_of_the_twin() -> str:
    return digest(load_by_twin, save_by_twin, shift_by_twin)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa: str, digest_of_the_twin: str) -> None:
    environment = {**os.environ, "VLCACHE_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "kernels.isa_probe"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    used, found = answer.split()
    assert used != "None", "the compiled library is missing"
    if used != isa:
        pytest.skip(f"this processor has no {isa}: run on one that has it")
    assert found == digest_of_the_twin
