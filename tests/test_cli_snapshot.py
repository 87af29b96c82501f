"""`vlcache snapshot` against a process that writes one slowly: waiting, not waiting, cancelling, interrupting."""

import json
import os
import pty
import signal
import termios
import time
from pathlib import Path

import pytest

from command_line import Run, Start, process_of


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_snapshot_waits_and_tells_what_was_written(
    start: Start, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    monkeypatch.chdir(tmp_path)
    status, out, err = run("snapshot", "image", "--bandwidth", "10MiB")
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path}/image: 20 entries, 1.2 MiB in ")
    assert (tmp_path / "image").stat().st_size == 20 << 16


def test_snapshot_in_the_background_can_be_cancelled_and_leaves_nothing(start: Start, run: Run, tmp_path: Path) -> None:
    start()
    assert run("snapshot", "--cancel") == (1, "", "vlcache snapshot: no snapshot is being written\n")
    image = tmp_path / "image"
    assert run("snapshot", image, "--no-wait", "--bandwidth", 10) == (0, f"the engine is writing {image}\n", "")
    status, _, err = run("snapshot", tmp_path / "other")
    assert status == 1
    assert err == "vlcache snapshot: a snapshot is being written already: wait for it or cancel it\n"
    assert run("snapshot", "--cancel", "--json") == (0, '{\n  "cancelled": true\n}\n', "")
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_that_cannot_be_written_is_one_line(start: Start, run: Run, tmp_path: Path) -> None:
    start()
    status, out, err = run("snapshot", tmp_path / "missing" / "image")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "No such file or directory" in err


def test_an_interrupted_wait_is_quiet_and_the_snapshot_goes_on(start: Start, runtime: Path, tmp_path: Path) -> None:
    start()
    vlcache = process_of(runtime, "snapshot", tmp_path / "image", "--bandwidth", "256K")
    wait_for(tmp_path / "image.unfinished")
    vlcache.send_signal(signal.SIGINT)
    out, err = vlcache.communicate()
    assert (vlcache.returncode, out) == (130, "")
    assert err.strip() == "the engine goes on writing; vlcache snapshot --cancel stops it"
    wait_for(tmp_path / "image")


def test_progress_is_a_bar_at_a_terminal_and_the_document_stays_clean(
    start: Start, runtime: Path, tmp_path: Path
) -> None:
    start()
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    vlcache = process_of(runtime, "snapshot", tmp_path / "image", "--json", stderr=terminal)
    out, _ = vlcache.communicate()
    assert vlcache.returncode == 0
    assert json.loads(out)["nbytes"] == 20 << 16
    os.set_blocking(screen, False)
    assert b"snapshot:" in os.read(screen, 1 << 16)
    os.close(terminal)
    os.close(screen)


def test_an_engine_that_dies_meanwhile_is_one_line(start: Start, runtime: Path, tmp_path: Path) -> None:
    engine = start()
    vlcache = process_of(runtime, "snapshot", tmp_path / "image", "--bandwidth", "10")
    wait_for(tmp_path / "image.unfinished")
    engine.kill()
    out, err = vlcache.communicate()
    assert (vlcache.returncode, out, err.count("\n")) == (1, "", 1)
    assert "ended the connection without an answer" in err
