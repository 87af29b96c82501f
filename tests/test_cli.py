"""`vlcache env`, on this environment and on environments that are made up of packages' metadata."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from vlcache_connector import cli

SOURCE = Path(__file__).parents[1] / "src"
RUN = "import sys; from vlcache_connector.cli import main; sys.exit(main())"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`vlcache` in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VLCACHE_")}
    places = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(SOURCE)]))
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        env={**clean, "PYTHONPATH": places, **environment},
        capture_output=True,
        text=True,
    )


def facts(*arguments: str, **environment: str) -> tuple[int, Any]:
    answer = command("env", "--json", *arguments, **environment)
    return answer.returncode, json.loads(answer.stdout)


def add_distribution(folder: Path, name: str, version: str) -> None:
    """What tells Python that a package is installed, without the package."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_env_shows_what_is_here_and_succeeds() -> None:
    status, found = facts()
    assert status == 0
    assert found.pop("works") is True
    assert found["python"]["value"] == f"{platform.python_version()}, {sys.executable}"
    assert found["torch"]["value"] == torch.__version__
    assert found["cuda"]["value"] == torch.version.cuda
    assert found["vllm"]["value"].startswith("0.32")
    assert str(SOURCE / "vlcache_connector" / "_cpu.so") in found["cpu_library"]["value"]
    assert [name for name, fact in found.items() if fact["problem"]] == []


def test_the_text_has_a_line_for_each_fact_with_all_values_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(facts()[1]) - 1  # "works" is the status
    start = next(line for line in lines if line.startswith("PyTorch")).index(torch.__version__)
    assert {line[start - 2 : start] for line in lines} == {"  "}
    assert all(line[0] != " " != line[start] for line in lines)


def test_looking_does_not_import_vllm() -> None:
    code = "import sys; from vlcache_connector.cli import main; main(['env']); sys.exit('vllm' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


def test_another_engine_version_is_a_problem_that_fails(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm", "0.31.2")
    status, found = facts(PYTHONPATH=str(tmp_path))
    assert status == 1
    assert found["works"] is False
    assert found["vllm"]["value"] == "0.31.2"
    assert "vLLM 0.31.2 is installed" in found["vllm"]["problem"]
    assert "Install vllm==0.32.*" in found["vllm"]["problem"]


def test_an_environment_with_neither_pytorch_nor_engine_is_told_so() -> None:
    code = f"import sys; sys.path = [{str(SOURCE)!r}] + [p for p in sys.path if 'site-packages' not in p]\n"
    code += "from vlcache_connector.cli import main; sys.exit(main(['env']))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 1
    for label, problem in (("vLLM", "install vllm==0.32.*"), ("PyTorch", "does not import: No module named 'torch'")):
        lines = answer.stdout.splitlines()
        place = next(i for i, line in enumerate(lines) if line.startswith(label))
        assert lines[place].split()[1:] == ["not", "installed"]
        assert lines[place + 1].strip().startswith(f"! {problem}")


def test_a_missing_native_library_is_said_once_with_advice_and_is_no_failure(tmp_path: Path) -> None:
    answer = command("env", VLCACHE_LIBRARY_DIR=str(tmp_path))
    assert answer.returncode == 0
    assert answer.stderr == ""
    about = [line for line in answer.stdout.splitlines() if "_cpu.so" in line]
    assert len(about) == 1
    for part in ("! ", f"{tmp_path}/_cpu.so is missing", "install g++"):
        assert part in about[0]


def test_optional_packages_are_shown_and_an_xformers_that_does_not_run_says_why(tmp_path: Path) -> None:
    add_distribution(tmp_path, "lmcache", "0.4.7")
    add_distribution(tmp_path, "xformers", "0.0.35")
    (tmp_path / "xformers.py").write_text("raise ImportError('it was built for CUDA 12.8')\n")
    status, found = facts(PYTHONPATH=str(tmp_path))
    assert status == 0
    assert found["lmcache"] == {"value": "0.4.7", "problem": None}
    assert found["xformers"]["value"] == "0.0.35"
    assert "does not run here" in found["xformers"]["problem"]
    assert "it was built for CUDA 12.8" in found["xformers"]["problem"]


def test_the_installed_command_is_this_one() -> None:
    (script,) = entry_points(group="console_scripts", name="vlcache")
    assert script.load() is cli.main


def test_no_command_is_an_error_that_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "env " in capsys.readouterr().out
