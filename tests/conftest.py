"""What tests of several rooms need."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command_line import ENVIRONMENT, TESTS, Start
from vlcache_connector import cli


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for control sockets, of this test alone, with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory() as where:
        monkeypatch.setenv("VLCACHE_RUNTIME_DIR", f"{where}/sockets")
        yield Path(where) / "sockets"


@pytest.fixture
def start(runtime: Path) -> Iterator[Start]:
    """Starts processes like engines, which end with the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(model: str = "vision/model", num_entries: int = 3, *state: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(TESTS / "small_host.py"), model, str(num_entries), *state]
        environment = {**ENVIRONMENT, "VLCACHE_RUNTIME_DIR": str(runtime)}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(str(runtime))
        return process

    yield begin
    for process in processes:
        process.communicate()


@pytest.fixture
def run(runtime: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`vlcache` in this process: status, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call
