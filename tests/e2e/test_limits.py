"""Quotas, the cost-aware policy and the trace on the real engine: options to what a user can see of them."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e import inside
from e2e.conftest import Start
from e2e.engine import Ask, Engine, Picture
from e2e.test_reuse import CLOSE, LONG, OPEN
from vlcache_connector import cli

QUOTA = 0.2
HOST_GIB = 0.02


@pytest.fixture(scope="module")
def trace_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits") / "trace"


@pytest.fixture(scope="module")
def limited(start_here: Start, trace_path: Path) -> Iterator[Engine]:
    options = {"host_gib": HOST_GIB, "eviction": "cost", "quotas": {"tenant:busy": QUOTA}, "ttl_s": {"kv": 3600}}
    engine = start_here("limits", "qwen3_vl", "float32", options | {"trace_path": str(trace_path)})
    engine.call(inside.watch_counters)
    yield engine
    engine.call(inside.check_store)


def show(engine: Engine, picture: Picture, salt: str | None = None) -> None:
    engine.ask_one(Ask([OPEN, "first seen here ", picture, CLOSE], salt=salt))


def events(engine: Engine, path: Path) -> list[dict[str, Any]]:
    engine.call(inside.end_trace)
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_a_busy_tenant_pushes_out_its_own_pictures_and_nobody_elses(limited: Engine) -> None:
    known = [Picture(number) for number in range(3)]
    for picture in known:
        show(limited, picture)
    pictures = [Picture(100 + number, 560, 560) for number in range(16)]
    for picture in pictures:
        show(limited, picture, "busy")
    counts = limited.call(inside.counters)
    assert counts["evictions:quota"] > 0 and "evictions:room" not in counts
    nbytes = limited.call(inside.nbytes_by_tenant)
    assert len(nbytes) == 2 and 0 < nbytes[inside.tag_of("busy")] <= QUOTA * HOST_GIB * 2**30
    limited.forget()
    for parts, salt, is_known in (
        ([LONG, *known], None, True),
        ([LONG, pictures[-1]], "busy", True),
        ([LONG, pictures[0]], "busy", False),
        ([LONG, pictures[-1]], None, False),
    ):
        report = limited.ask_one(Ask([OPEN, *parts, CLOSE], ratio=0.05, salt=salt)).report
        assert (report["reused_tokens"] > 0) == is_known, (parts, salt)


def test_entries_carry_the_seconds_that_the_engine_measured(limited: Engine) -> None:
    """A hit of an embedding saves its encoding, one of KV its prefill; both were measured by the engine's own work."""
    for number in range(8):
        limited.forget()
        limited.ask_one(Ask([OPEN, f"{number}", LONG, LONG, Picture(200 + number, 560, 560), CLOSE], "off"))
    prices = limited.call(inside.prices)
    assert prices["encode"] > 0 and prices["compute"] > 0
    show(limited, Picture(300, 560, 560))
    for kind, price in (("embedding", "encode"), ("kv", "compute")):
        num_tokens, seconds = limited.call(inside.latest_entry, kind)
        assert num_tokens > 200
        assert seconds == pytest.approx(num_tokens * prices[price], rel=0.5)


def test_the_trace_of_what_was_asked_can_be_simulated(
    limited: Engine, trace_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last test of this file: it ends the trace."""
    new, loud = Picture(400), "a tenant that nobody shall read of"
    for _ in range(2):
        limited.forget()
        limited.ask_one(Ask([OPEN, LONG, new, CLOSE], ratio=0.05, salt=loud))
    found = events(limited, trace_path)
    recent = [each for each in found if each["class"][2] == found[-1]["class"][2]]
    by_op = Counter((each["op"], each["class"][0]) for each in recent)
    assert by_op == {(op, kind): 1 for op in ("miss", "insert", "hit") for kind in ("kv", "embedding")}
    assert all(each["seconds"] > 0 for each in recent)
    text = trace_path.read_text()
    assert loud not in text and inside.tag_of(loud) not in text
    assert any(each["op"] == "evict" and each["reason"] == "quota" for each in found)
    assert cli.main(["simulate", str(trace_path), "--json"]) == 0
    outcomes = json.loads(capsys.readouterr().out)["outcomes"]
    assert outcomes[-1]["hit_ratio"]["seconds"] > 0
