"""Snapshots as commands: who waits, who stops; and what arguments a running cache accepts."""

from pathlib import Path

import pytest

from store.live_scene import Live
from vlcache_connector.errors import VLCacheError
from vlcache_connector.store.commands import LiveCommands
from vlcache_connector.store.control.protocol import ControlError, Message, commands_of, result_of

# -- snapshot ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_shows_progress_and_ends_with_what_was_written(tmp_path: Path) -> None:
    *progress, last = Live(1).commands.snapshot(tmp_path / "image", None)
    done = [message["progress"]["done"] for message in progress]
    assert done == sorted(done)
    assert last["result"]["nbytes"] == (tmp_path / "image").stat().st_size


def test_who_stops_waiting_does_not_stop_the_snapshot_and_only_one_is_written(tmp_path: Path) -> None:
    live = Live(1)
    commands = live.commands
    messages = commands.snapshot(tmp_path / "image", None)
    next(messages)
    del messages
    with pytest.raises(VLCacheError, match="being written already"):
        next(commands.snapshot(tmp_path / "other", None))
    assert live.snapshots.wait().state == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert result_of(commands.snapshot(tmp_path / "other", None))["path"] == str(tmp_path / "other")


def test_cancelling_ends_the_snapshot_with_an_error_for_whoever_waits(tmp_path: Path) -> None:
    commands = Live(1).commands
    assert not commands.cancel_snapshot()
    messages = commands.snapshot(tmp_path / "image", 1000)
    next(messages)
    assert commands.cancel_snapshot()
    with pytest.raises(VLCacheError, match="cancelled"):
        list(messages)
    assert list(tmp_path.iterdir()) == []
    assert not commands.cancel_snapshot()


def test_a_snapshot_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="No such file"):
        list(Live(1).commands.snapshot(tmp_path / "missing" / "image", None))


def test_an_engine_without_snapshots_says_so(tmp_path: Path) -> None:
    live = Live(1)
    commands = LiveCommands(live.index, live.lock, [], dict)
    with pytest.raises(ControlError, match="writes no snapshots"):
        list(commands.snapshot(tmp_path / "image", None))
    assert not commands.cancel_snapshot()


# -- what comes over the socket ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        {"command": "ls", "limit": -1},
        {"command": "ls", "limit": True},
        {"command": "ls", "limit": "3"},
        {"command": "ls", "sort": "name"},
        {"command": "ls", "sort": ["new"]},
        {"command": "check", "deep": "yes"},
        {"command": "clear"},
        {"command": "clear", "tiers": []},
        {"command": "clear", "tiers": "host"},
        {"command": "clear", "tiers": [["host"]]},
        {"command": "snapshot"},
        {"command": "snapshot", "path": "relative"},
        {"command": "snapshot", "path": "/a\0b"},
        {"command": "snapshot", "path": "/a", "bandwidth": 0},
        {"command": "snapshot", "path": "/a", "bandwidth": 1.5},
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_refused_in_words(request_: Message) -> None:
    live = Live(1)
    with pytest.raises(ControlError, match="give "):
        list(commands_of(live.commands)[request_["command"]](request_))
    assert len(live.index) == 1
