"""The control socket with real sockets: what it answers, also to those who mean it no good."""

import json
import logging
import socket
import time
from pathlib import Path

import pytest

from store.control_scene import ABOUT, Scene, answers
from vlcache_connector.store.control import client, server
from vlcache_connector.store.control.protocol import MAX_REQUEST_NBYTES

# -- what is answered -------------------------------------------------------------------------------------------------


def test_arguments_arrive_and_the_result_comes_back(scene: Scene) -> None:
    request = {"command": "echo", "text": "ü\n", "list": [1, None]}
    assert scene.ask(json.dumps(request).encode() + b"\n") == [{"result": request}]


@pytest.mark.parametrize(
    "raw",
    [
        b"\n",
        b"\x00\xff\xfe\x80 not text\n",
        b"[1]\n",
        b'"about"\n',
        b"{\n",
        b"[" * 60_000 + b"\n",
        b'{"command": "nothing"}\n',
        b'{"command": ["about"]}\n',
        b'{"command": {}}\n',
        b"{}\n",
        b"x" * (MAX_REQUEST_NBYTES + 10_000),
        b"x" * (40 << 20),
        b"NaN\n",
    ],
    ids=lambda raw: f"{raw[:12]!r}, {len(raw)}",
)
def test_hostile_requests_get_one_error_and_hurt_nobody(
    scene: Scene, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (answer,) = scene.ask(raw)
    assert set(answer) == {"error"}
    assert ("longer than 65536 bytes" in answer["error"]) == (len(raw) > MAX_REQUEST_NBYTES)
    assert scene.is_alive()
    assert caplog.text == ""


def test_a_request_that_ends_or_stops_half_way_is_given_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    with scene.connect() as connection:
        connection.sendall(b'{"comm')
        connection.shutdown(socket.SHUT_WR)
        assert "ended before the request did" in answers(connection)[0]["error"]
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.2)
    with scene.connect() as connection:
        connection.sendall(b'{"comm')
        assert "no request came" in answers(connection)[0]["error"]
    assert scene.is_alive()


def test_a_refusal_and_a_bug_are_errors_and_the_log_tells_of_the_bug(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    assert scene.ask(b'{"command": "fail", "how": "told"}\n') == [{"error": "do it the other way"}]
    assert caplog.text == ""
    (answer,) = scene.ask(b'{"command": "fail", "how": "bug"}\n')
    assert "ZeroDivisionError: a bug" in answer["error"]
    assert "ZeroDivisionError" in caplog.text
    (answer,) = scene.ask(b'{"command": "fail", "how": "unserialisable"}\n')
    assert "not JSON serializable" in answer["error"]
    assert scene.is_alive()


def test_many_clients_are_served_at_once_and_more_are_told_to_come_later(scene: Scene) -> None:
    connections = [scene.connect() for _ in range(server.MAX_CLIENTS)]
    for connection in connections:
        connection.sendall(b'{"command": "wait"}\n')
        scene.waiting.acquire()
    assert "try again later" in scene.ask(b'{"command": "about"}\n')[0]["error"]
    scene.go_on.set()
    assert [answers(connection) for connection in connections] == [[{"result": "waited"}]] * server.MAX_CLIENTS
    for connection in connections:
        connection.close()
    for _ in range(1000):  # their places become free a moment after their answers
        if scene.is_alive():
            return
        time.sleep(0.01)
    raise AssertionError("nobody is served any more")


def test_a_client_that_vanishes_ends_its_command_only(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with scene.connect() as connection:
        connection.sendall(b'{"command": "flood"}\n')
        assert connection.recv(10)
        assert scene.is_alive()
    assert scene.closed.wait(30)
    assert scene.is_alive()
    assert caplog.text == ""


def test_a_client_that_stops_reading_is_dropped(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ANSWER_TIMEOUT_S", 0.2)
    with scene.connect() as connection:
        connection.sendall(b'{"command": "flood"}\n')
        assert scene.closed.wait(30)
    assert scene.is_alive()


# -- the client -------------------------------------------------------------------------------------------------------


def test_discovery_finds_what_answers_and_passes_over_what_does_not(
    scene: Scene, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_ANSWER_TIMEOUT_S", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(runtime / "2-silent.sock"))
        silent.listen()
        (runtime / "3-file.sock").write_text("")
        assert [(cache.path, about) for cache, about in client.discover()] == [(scene.path, ABOUT)]
