"""The recorder: what it writes, what it keeps to itself, and that nothing it meets reaches the engine."""

import json
import logging
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from vlcache_connector.store import trace as trace_module
from vlcache_connector.store.trace import Trace
from vlcache_connector.types import EntryClass

KV = EntryClass("kv", "image")
THEIRS = EntryClass("embedding", "image", "0123456789abcdef")
KEY, OTHER = b"\x01" * 32, b"\x02" * 32


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(path: Path) -> Trace:
    trace = Trace(str(path), 1 << 20)
    trace.looked_up(KEY, 100, None, KV, is_hit=False)
    trace.inserted(KEY, 256, 0.5, KV)
    trace.looked_up(KEY, 256, 0.5, KV, is_hit=True)
    trace.looked_up(OTHER, 512, 0.25, THEIRS, is_hit=False)
    trace.evicted(KEY, 256, KV, "room")
    return trace


def test_every_event_is_one_line_in_order(tmp_path: Path) -> None:
    record(tmp_path / "trace").close()
    header, *events = read(tmp_path / "trace")
    assert header == {"vlcache_trace": 1, "capacity": 1 << 20}
    assert [event["op"] for event in events] == ["miss", "insert", "hit", "miss", "evict"]
    assert [event["nbytes"] for event in events] == [100, 256, 256, 512, 256]
    assert [event["seconds"] for event in events] == [None, 0.5, 0.5, 0.25, None]
    assert [event.get("reason") for event in events] == [None, None, None, None, "room"]
    times = [event["t"] for event in events]
    assert times == sorted(times) and times[0] >= 0
    assert len({events[n]["key"] for n in (0, 1, 2, 4)}) == 1
    assert events[3]["key"] != events[0]["key"]
    assert events[0]["class"] == ["kv", "image", ""]
    assert events[3]["class"][:2] == ["embedding", "image"]


def test_neither_keys_nor_tenants_can_be_told_from_the_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        record(tmp_path / name).close()
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one[1]["key"] != two[1]["key"], "a fixed hash can be looked up"
    assert one[4]["class"][2] != two[4]["class"][2]
    text = (tmp_path / "one").read_text()
    assert KEY.hex() not in text and THEIRS.tenant not in text
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600


def test_an_earlier_trace_is_not_overwritten(tmp_path: Path) -> None:
    record(tmp_path / "trace").close()
    before = (tmp_path / "trace").read_bytes()
    record(tmp_path / "trace").close()
    assert (tmp_path / "trace").read_bytes() == before
    assert len(read(tmp_path / "trace.1")) == 6


def test_events_reach_the_file_while_the_engine_runs(tmp_path: Path) -> None:
    trace = record(tmp_path / "trace")
    deadline = time.monotonic() + 30
    while len(read(tmp_path / "trace")) < 6:
        assert time.monotonic() < deadline, "nothing is written before the end"
        time.sleep(0.05)
    trace.close()


@pytest.mark.parametrize("path", ["/proc/trace", "missing/folder/trace"])
def test_a_path_that_cannot_be_written_is_one_log_line_and_no_trace(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        record(tmp_path / path).close()
    assert len(caplog.records) == 1
    assert "records no trace" in caplog.text


def test_a_full_disk_ends_the_trace_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trace = record_to_device("/dev/full")
        record_more(trace)
        trace.close()
        record_more(trace)
    assert [record.message for record in caplog.records] == [
        "VLCache ends its trace: [Errno 28] No space left on device"
    ]


def record_to_device(path: str) -> Trace:
    """`Trace` creates new files only: for this one the device stands in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_module, "_create", lambda _: os.fdopen(os.open(path, os.O_WRONLY), "w"))
        return Trace(path, 1)


def record_more(trace: Trace) -> None:
    for _ in range(10):
        trace.looked_up(KEY, 1, None, KV, is_hit=True)


def test_a_trace_ends_at_its_largest_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "MAX_NBYTES", 300)
    with caplog.at_level(logging.WARNING):
        record(tmp_path / "trace").close()
    assert len(caplog.records) == 1
    assert (tmp_path / "trace").stat().st_size <= 300
    assert read(tmp_path / "trace")[0]["vlcache_trace"] == 1


def test_a_disk_that_is_too_slow_costs_events_and_not_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "_MAX_QUEUED", 3)
    monkeypatch.setattr(trace_module, "_PAUSE_S", 60.0)
    with caplog.at_level(logging.WARNING):
        record(tmp_path / "trace").close()
    assert [event["op"] for event in read(tmp_path / "trace")[1:]] == ["miss", "insert", "hit"]
    assert "2 events are missing" in caplog.text
