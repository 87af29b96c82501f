"""What people do with a running server's cache: look at it, check it, clear it, take a snapshot, and start from one."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import cached_checkpoint
from e2e.engine import Picture
from e2e.server import Server
from e2e.test_serving import LIMITS, chat, flag
from vlcache_connector.cli import main

A, B = Picture(1), Picture(2)
Vlcache = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of all that outlives a server; sockets need a short path."""
    with tempfile.TemporaryDirectory() as runtime, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLCACHE_RUNTIME_DIR", f"{runtime}/sockets")
        yield tmp_path_factory.mktemp("operations")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    options = {"disk_path": str(folder / "disk"), "snapshot_path": str(folder / "snapshot")}
    yield from served(folder / "first.log", **options)


def served(log: Path, **options: Any) -> Iterator[Server]:
    checkpoint = cached_checkpoint("qwen2_5_vl", 256, 4, root=Path(".checkpoints"))
    started = Server(checkpoint, log, *LIMITS, "--enforce-eager", *flag(**options))
    try:
        yield started.wait_until_ready()
    finally:
        started.close()


@pytest.fixture
def vlcache(capsys: pytest.CaptureFixture[str]) -> Vlcache:
    """Runs a command that must succeed; returns its JSON."""

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def show(server: Server, *pictures: Picture) -> None:
    for picture in pictures:
        chat(server, "first seen here: ", picture)


def report_of(server: Server, *parts: str | Picture) -> Any:
    return chat(server, *parts)["kv_transfer_params"]["vlcache"]


def entries_of(vlcache: Vlcache, tier: str, count: int) -> list[Any]:
    """The entries of one tier, once there are so many: what was computed last is saved with the next step."""
    deadline = time.monotonic() + 30
    while True:
        found = [entry for entry in vlcache("ls", "--limit", "0")["entries"] if entry["tier"] == tier]
        if len(found) >= count or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def test_ls_and_check_see_what_the_server_has(server: Server, vlcache: Vlcache) -> None:
    show(server, A, B)
    for tier in ("host", "disk"):
        found = entries_of(vlcache, tier, 4)
        assert sorted(entry["kind"] for entry in found) == ["embedding", "embedding", "kv", "kv"]
        assert {entry["num_tokens"] for entry in found} == {100}
    result = vlcache("check", "--deep")
    assert result["problems"] == [] and result["entries"] == 8


def test_a_snapshot_warms_the_next_server(server: Server, vlcache: Vlcache, folder: Path) -> None:
    show(server, A, B)
    entries_of(vlcache, "host", 4)
    assert vlcache("snapshot", str(folder / "snapshot"))["entries"] == 4
    server.close()
    assert not list(folder.rglob("*.partial"))
    for second in served(folder / "second.log", snapshot_path=str(folder / "snapshot")):
        assert len(entries_of(vlcache, "host", 4)) == 4, "before any request"
        report = report_of(second, "words of today: ", B, " and ", A)
        assert report["reused_tokens"] > 160 and report["tier"] == "host"


def test_clear_forgets_and_the_server_goes_on(folder: Path, vlcache: Vlcache) -> None:
    for server in served(folder / "third.log", disk_path=str(folder / "disk")):
        assert report_of(server, "from disk: ", A)["tier"] == "disk"
        cleared = vlcache("clear", "--tier", "host", "--tier", "disk", "--yes")["removed"]
        assert cleared["disk"] == 4 and cleared["host"] >= 2
        assert report_of(server, "after it was cleared: ", A)["reason"] == "miss"
        assert report_of(server, "learnt again: ", A)["reused_tokens"] > 80
        assert vlcache("check", "--deep")["problems"] == []
    assert not list(folder.parent.rglob("*.sock"))
