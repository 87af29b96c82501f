"""`vlcache warm` where it cannot work; the rest of it needs a server, see `e2e/test_serving.py`."""

import socket
from pathlib import Path

import pytest

from command_line import Run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(b"an image")
    return path


@pytest.fixture
def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_without_a_server_the_error_names_the_address(run: Run, image: Path, nobody: str) -> None:
    status, out, err = run("warm", image, "--url", nobody)
    assert (status, out) == (1, "")
    assert err.startswith(f"vlcache warm: {nobody}/v1/models does not answer: ")
    assert err.count("\n") == 1


def test_a_file_that_is_not_there_is_found_before_anything_is_asked(run: Run, image: Path, nobody: str) -> None:
    status, out, err = run("warm", image, "missing.png", "--url", nobody)
    assert (status, out, err) == (1, "", "vlcache warm: there is no file missing.png\n")


def test_requests_at_a_time_are_at_least_one(run: Run, image: Path) -> None:
    for wrong in ("0", "-1", "many"):
        status, _, err = run("warm", image, f"--parallel={wrong}")
        assert status == 2
        assert f"'{wrong}' is not a whole number from 1" in err


def test_every_file_that_fails_is_named_and_does_not_stop_the_others(run: Run, image: Path, nobody: str) -> None:
    other = image.with_name("other.png")
    other.write_bytes(b"another")
    status, out, err = run("warm", image, other, "--url", nobody, "--model", "named")
    assert (status, out) == (1, "2 files: 0 computed, 0 known before, 2 failed\n")
    assert [line.partition(": ")[0] for line in err.splitlines()] == [str(image), str(other)]
