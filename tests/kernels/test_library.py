"""Loading what was compiled, and going on without it. Each case is a process of its own: libraries load once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "src"

SAVE_AND_REPORT = """
import json, torch
from vlcache_connector.kernels import library, ops

pages = torch.arange(2.0 * 4 * 6).view(2, 1, 4, 6)  # 2 blocks of 4 tokens, one head, 3 numbers of K and 3 of V
layout = ops.PageLayout.alike(4, ops.Strides(0, 6, 24, 1), 3)
entry = torch.empty(1, 2, 3, 1, 3)
for _ in range(2):
    ops.save_rows(entry, [pages], torch.tensor([7, 0, 5]), layout)
assert torch.equal(ops.shift_rows(entry[0], torch.ones(2, 3, 1, 3), torch.zeros(3, 2, 0)), entry[0] + 1)
report = [(s.device, str(s.path), s.is_needed, s.is_loaded, s.problem) for s in library.library_report()]
print(json.dumps([entry.flatten().tolist(), sorted(library.load_libraries()), library.cpu_isa(), report]))
"""
# rows 7, 0 and 5 of `pages`: K, then V
SAVED = [42.0, 43, 44, 0, 1, 2, 30, 31, 32, 45, 46, 47, 3, 4, 5, 33, 34, 35]


def run(**environment: str) -> tuple[Any, list[str]]:
    """What the script above prints, and the lines of its log."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VLCACHE_")}
    answer = subprocess.run(
        [sys.executable, "-c", SAVE_AND_REPORT],
        env={**clean, "PYTHONPATH": str(SOURCE), **environment},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout), answer.stderr.splitlines()


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, of binutils, is not installed")
def test_a_library_shows_others_nothing_but_its_own_function() -> None:
    """Another's copy of a function of the standard library could stand in for ours."""
    library = str(SOURCE / "vlcache_connector" / "_cpu.so")
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["vlcache_cpu_isa"]


def test_with_the_compiled_library_nothing_is_logged() -> None:
    (saved, loaded, _, report), log = run()
    assert saved == SAVED
    assert "CPU" in loaded
    assert report[0][:4] == ["CPU", str(SOURCE / "vlcache_connector" / "_cpu.so"), True, True]
    assert log == []


def test_without_a_library_operations_run_as_plain_pytorch_and_the_log_says_so_once(tmp_path: Path) -> None:
    (saved, loaded, isa, report), log = run(VLCACHE_LIBRARY_DIR=str(tmp_path))
    assert saved == SAVED
    assert "CPU" not in loaded
    assert isa is None
    about_cpu = [line for line in log if "_cpu.so" in line]
    assert len(about_cpu) == 1
    assert f"{tmp_path}/_cpu.so is missing" in about_cpu[0]
    assert "install g++" in about_cpu[0]
    assert report[0][4] in about_cpu[0]


def not_a_library(path: Path) -> None:
    path.write_bytes(b"a note")


def a_library_for_another_pytorch(path: Path) -> None:
    code = "extern int a_function_of_a_later_pytorch(void); int use(void) { return a_function_of_a_later_pytorch(); }"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=code, text=True, check=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(not_a_library, "file too short"), (a_library_for_another_pytorch, "a_function_of_a_later_pytorch")],
)
def test_a_library_that_does_not_load_is_one_line_with_the_reason(tmp_path: Path, make: Any, reason: str) -> None:
    make(tmp_path / "_cpu.so")
    (saved, loaded, _, report), log = run(VLCACHE_LIBRARY_DIR=str(tmp_path))
    assert saved == SAVED
    assert "CPU" not in loaded
    about_cpu = [line for line in log if "_cpu.so" in line]
    assert len(about_cpu) == 1
    for part in (reason, f"does not load beside PyTorch {torch.__version__}", "pip install"):
        assert part in about_cpu[0]
    assert report[0][4] in about_cpu[0]


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="this PyTorch was built for CUDA, so the file would be loaded"
)
def test_a_cuda_library_is_left_alone_where_pytorch_has_no_cuda(tmp_path: Path) -> None:
    (tmp_path / "_cpu.so").symlink_to(SOURCE / "vlcache_connector" / "_cpu.so")
    not_a_library(tmp_path / "_cuda.so")
    (saved, loaded, _, report), log = run(VLCACHE_LIBRARY_DIR=str(tmp_path))
    assert saved == SAVED
    assert loaded == ["CPU"]
    assert report[1] == ["CUDA", str(tmp_path / "_cuda.so"), False, False, ""]
    assert log == []


ISAS = ["generic", "avx2", "avx512"]


@pytest.fixture(scope="module")
def best_isa() -> str:
    (_, _, isa, _), _ = run()
    assert isa in ISAS
    return str(isa)


@pytest.mark.parametrize("wish", ISAS)
def test_the_environment_lowers_the_instruction_set_and_never_raises_it(best_isa: str, wish: str) -> None:
    (saved, _, isa, _), log = run(VLCACHE_CPU_ISA=wish)
    assert saved == SAVED
    assert isa == min(wish, best_isa, key=ISAS.index)
    assert log == []


def test_an_instruction_set_that_nobody_knows_is_ignored_with_one_line(best_isa: str) -> None:
    (_, _, isa, _), log = run(VLCACHE_CPU_ISA="sse9")
    assert isa == best_isa
    assert len(log) == 1
    assert "VLCACHE_CPU_ISA=sse9" in log[0]
