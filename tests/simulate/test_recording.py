"""Traces as they are read: what is in them, and that a file that is none is an error that names the line."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlcache_connector.simulate.recording import TraceError, read
from vlcache_connector.store.trace import Trace
from vlcache_connector.types import EntryClass

KV = EntryClass("kv", "image")
HEADER = {"vlcache_trace": 1, "capacity": 100}
EVENT = {"t": 1.0, "op": "miss", "key": "aa", "nbytes": 10, "seconds": 0.5, "class": ["kv", "image", ""]}


def write(path: Path, *lines: Any) -> Path:
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def error_of(path: Path) -> str:
    with pytest.raises(TraceError) as caught:
        read(path)
    return str(caught.value)


def test_what_the_recorder_wrote_is_read(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "trace"), 1 << 20)
    for is_hit in (False, True):
        trace.looked_up(b"a", 100, 0.5, KV, is_hit)
        trace.inserted(b"a", 100, 0.5, KV)
        trace.evicted(b"a", 100, KV, "room")
    trace.looked_up(b"b", 200, None, EntryClass("embedding", "image", "aaaa"), is_hit=True)
    trace.close()
    recording = read(tmp_path / "trace")
    assert recording.capacity == 1 << 20
    assert [(each.nbytes, each.seconds, each.entry_class.kind) for each in recording.lookups] == [
        (100, 0.5, "kv"),
        (100, 0.5, "kv"),
        (200, 0.0, "embedding"),
    ]
    assert recording.num_entries == 2


def test_a_look_up_that_had_no_price_yet_gets_the_mean_of_its_kind(tmp_path: Path) -> None:
    events = [EVENT | {"seconds": None, "nbytes": 30, "key": "b"}, EVENT, EVENT | {"seconds": 1.5, "key": "c"}]
    lookups = read(write(tmp_path / "trace", HEADER, *events)).lookups
    assert [lookup.seconds for lookup in lookups] == [3.0, 0.5, 1.5]


def test_a_key_has_one_size(tmp_path: Path) -> None:
    lookups = read(write(tmp_path / "trace", HEADER, EVENT, EVENT | {"nbytes": 99})).lookups
    assert [lookup.nbytes for lookup in lookups] == [10, 10]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"\x00\xff\xfe\n",
        b"[" * 3000 + b"\n",
        b"[]\n",
        b"1\n",
        b"null\n",
        json.dumps(EVENT)[:-3].encode(),
        json.dumps(EVENT).encode(),  # without an end of line
        json.dumps(EVENT)[:-3].encode() + b"\n",
        json.dumps(EVENT | {"more": "x" * 5000}).encode() + b"\n",
        b'{"t": ' + b"9" * 4000 + b"}\n",
        *[EVENT | {"t": bad} for bad in (-1, None, "1", float("nan"), float("inf"), True, [1], 10**400)],
        *[EVENT | {"op": bad} for bad in ("", "find", None, 1, ["hit"])],
        *[EVENT | {"key": bad} for bad in ("", "a" * 65, None, 1)],
        *[EVENT | {"nbytes": bad} for bad in (0, -1, 1.5, None, True, 1 << 80, "10")],
        *[EVENT | {"seconds": bad} for bad in (-1, "1", float("nan"), float("inf"), True)],
        *[EVENT | {"class": bad} for bad in (None, "kv", [], ["kv", "image"], ["kv", "image", 1])],
        {name: value for name, value in EVENT.items() if name != "seconds"},
    ],
    ids=lambda line: ascii(line)[:60],
)
def test_a_hostile_line_is_an_error_that_names_it(line: Any, tmp_path: Path) -> None:
    if line == b"":
        assert "line 1" in error_of(write(tmp_path / "trace"))
        return
    assert error_of(write(tmp_path / "trace", HEADER, EVENT, line)).startswith("line 3: ")


@pytest.mark.parametrize(
    "header", [EVENT, {}, HEADER | {"vlcache_trace": 2}, HEADER | {"capacity": 0}, {"vlcache_trace": 1}, [1]]
)
def test_a_file_of_another_kind_is_an_error(header: Any, tmp_path: Path) -> None:
    assert error_of(write(tmp_path / "trace", header, EVENT)).startswith("line 1: ")


def test_a_trace_without_look_ups_is_an_error(tmp_path: Path) -> None:
    assert "no look-ups" in error_of(write(tmp_path / "trace", HEADER, EVENT | {"op": "insert"}))


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    assert "No such file" in error_of(tmp_path / "missing")
    assert "directory" in error_of(tmp_path)
