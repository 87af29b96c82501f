"""The files of control sockets: who can reach them, and what is left of them."""

import gc
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from store.control_scene import ABOUT, Scene
from vlcache_connector.store.control import client, folder
from vlcache_connector.store.control.server import ControlServer

# -- who may come in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_folder_and_socket_are_private_whatever_the_umask(runtime: Path, umask: int) -> None:
    before = os.umask(umask if umask != 0o777 else 0o077)
    try:
        runtime.mkdir(mode=0o700)
        os.umask(umask)
        scene = Scene()
    finally:
        os.umask(before)
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    assert stat.S_IMODE(scene.path.stat().st_mode) == 0o600
    assert scene.is_alive()
    scene.server.close()


def test_the_folder_is_made_private(scene: Scene, runtime: Path) -> None:
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    assert scene.path.parent == runtime
    assert scene.path.name.startswith(f"{os.getpid()}-")


def test_the_socket_is_private_from_the_moment_it_appears(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def chmod(path: Path, mode: int, original: Any = Path.chmod) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        original(path, mode)

    monkeypatch.setattr(Path, "chmod", chmod)
    before = os.umask(0)
    try:
        Scene().server.close()
    finally:
        os.umask(before)
    assert modes == [0o600]


def link_elsewhere(where: Path) -> None:
    (where.parent / "elsewhere").mkdir(mode=0o700)
    where.symlink_to(where.parent / "elsewhere")


def group_may_write(where: Path) -> None:
    where.mkdir()
    where.chmod(0o770)


def all_may_write(where: Path) -> None:
    where.mkdir()
    where.chmod(0o1707)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (link_elsewhere, "is a link"),
        (group_may_write, "can be written to by others (mode 0770)"),
        (all_may_write, "can be written to by others (mode 1707)"),
        (lambda where: where.write_text(""), "cannot make"),
    ],
)
def test_a_folder_that_others_could_use_gets_no_socket_and_a_warning(
    runtime: Path, prepare: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(runtime)
    refused = ControlServer({}, "scene")
    assert refused.path is None
    assert words in caplog.text
    assert "VLCACHE_RUNTIME_DIR" in caplog.text
    assert list(runtime.parent.rglob("*.sock")) == []
    refused.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away; run as root")
def test_a_folder_of_another_user_gets_no_socket(runtime: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime.mkdir(mode=0o700)
    os.chown(runtime, 12345, 12345)
    assert ControlServer({}, "scene").path is None
    assert "belongs to user 12345" in caplog.text
    assert client.discover() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; run as root")
def test_another_user_who_got_at_the_socket_is_refused(scene: Scene, runtime: Path) -> None:
    for place in (runtime.parent, runtime):
        place.chmod(0o755)
    scene.path.chmod(0o666)
    code = (
        "import os, socket, sys; os.setgid(12345); os.setuid(12345); s = socket.socket(socket.AF_UNIX)\n"
        f"s.connect({str(scene.path)!r}); print(s.makefile().read())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == {"error": "only the user that runs the engine, or root, may ask it"}


def test_a_client_asks_nobody_in_a_folder_that_others_can_write_to(scene: Scene, runtime: Path) -> None:
    assert [cache.path for cache, _ in client.discover()] == [scene.path]
    runtime.chmod(0o770)
    assert client.discover() == []


def test_a_path_too_long_for_a_socket_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLCACHE_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    assert ControlServer({}, "scene").path is None
    assert "too long for a socket; set VLCACHE_RUNTIME_DIR" in caplog.text


def test_where_sockets_lie_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv("VLCACHE_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    fallback = tmp_path / "temporary" / f"vlcache-{os.geteuid()}"
    assert folder.chosen() == fallback
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert folder.chosen() == tmp_path / "vlcache"
    assert {tmp_path / "vlcache", fallback} <= set(folder.candidates())  # a service may have had no XDG_RUNTIME_DIR
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert folder.chosen() != tmp_path / "missing" / "vlcache"
    monkeypatch.setenv("VLCACHE_RUNTIME_DIR", str(tmp_path / "mine"))
    assert folder.candidates() == [folder.chosen()] == [tmp_path / "mine"]


# -- what stays behind ------------------------------------------------------------------------------------------------


def test_closing_takes_the_socket_away_and_can_be_repeated(scene: Scene) -> None:
    scene.server.close()
    scene.server.close()
    assert not scene.path.exists()
    with pytest.raises(OSError, match="No such file"):
        scene.connect()


def test_a_server_that_nobody_holds_any_more_is_gone(runtime: Path) -> None:
    scene = Scene()
    path = scene.path
    del scene
    gc.collect()
    assert not path.exists()


def hosting(then: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that serves and then does something; and its socket."""
    code = (
        "import os, sys\nfrom vlcache_connector.store.control.server import ControlServer\n"
        f"server = ControlServer({{'about': lambda _: iter([{{'result': {ABOUT!r}}}])}}, 'engine')\n"
        f"print(server.path, flush=True)\nsys.stdin.read()\n{then}"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError", "del server; os.wait() if os.fork() else 0"])
def test_a_process_that_ends_in_order_leaves_no_socket(runtime: Path, end: str) -> None:
    process, path = hosting(end)
    assert path.exists()
    process.communicate()
    assert not path.exists()


def test_a_forked_child_that_ends_leaves_the_socket_alone(runtime: Path) -> None:
    process, path = hosting("if os.fork(): os.wait(); print(os.path.exists(server.path))\n")
    output, _ = process.communicate()
    assert output.strip() == "True"
    assert not path.exists()


def test_sockets_of_killed_processes_are_removed_by_the_next_server_and_by_clients(runtime: Path) -> None:
    for clean in (lambda: Scene().server.close(), client.discover):
        process, path = hosting("")
        live, live_path = hosting("")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert path.exists()
        clean()
        assert not path.exists()
        assert live_path.exists()
        live.communicate()


def test_what_is_no_socket_of_ours_stays_where_it_is(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    others = [runtime / name for name in ("notes.txt", "1-a.sock.txt", "no-number.new")]
    for path in others:
        path.write_text("mine")
    (runtime / "99999999-dead.new").write_text("")
    Scene().server.close()
    assert sorted(runtime.iterdir()) == sorted(others)
