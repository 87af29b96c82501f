"""Engines that share a remote store, one of them new: what one computed, the other reuses from its first request on.

What is fetched is compared byte by byte with what was stored, on every rank, in the step that reads it (`fake_worker`).
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.conftest import MakeEngine
from engine.fake_prompts import Ask, text
from engine.scenes import BETWEEN, CLOSE, OPEN, PROMPT, A, B, C, counts, drop_entries, reused, set_prices, show
from engine.tier_scenes import damage, held_back, show_and_write
from store.remote_tiers import needs_lmcache
from vlcache_connector.engine import fetches
from vlcache_connector.errors import OptionError
from vlcache_connector.store.remote.adapter import Adapter, AdapterTimeoutError
from vlcache_connector.store.remote.tier import RemoteTier

pytestmark = needs_lmcache


@pytest.fixture
def remote(tmp_path: Path) -> dict[str, Any]:
    store = {"type": "fs_native", "base_path": str(tmp_path / "store"), "num_workers": 2, "timeout_s": 20}
    return {"remote": store}


@pytest.fixture(params=["ask"])
def gate(request: Any) -> Iterator[threading.Event]:
    """Questions to the store, or reads from it, wait until it is set."""
    with held_back(RemoteTier, request.param) as event:
        yield event


def blobs(remote: dict[str, Any]) -> list[Path]:
    return [
        path
        for path in Path(remote["remote"]["base_path"]).rglob("*@0x000*.data")
        if f"@{bytes(32).hex()}" not in path.name
    ]


def test_the_first_request_of_a_second_engine_reuses_what_the_first_computed(
    make_engine: MakeEngine, remote: dict[str, Any]
) -> None:
    first, second = make_engine(**remote), make_engine(**remote)
    show_and_write(first)
    (answer,) = second.ask(Ask(PROMPT))
    assert reused(answer) > 0 and answer.report["tier"] == "remote" and second.encoded == []
    second.forget()
    (answer,) = second.ask(Ask([*CLOSE, A, B, *OPEN]))
    assert reused(answer) > 0 and answer.report["tier"] == "host"
    found = counts(second)
    assert found["read_entries:remote"] == found["asked_entries:remote_hit"] == 4 and found["asked_seconds:remote"] > 0
    assert "written_entries:remote" not in found, "nothing is written back to where it came from"


def test_what_the_store_does_not_hold_is_computed_and_shared(make_engine: MakeEngine, remote: dict[str, Any]) -> None:
    first, second = make_engine(**remote), make_engine(**remote)
    show_and_write(first, salt="one")
    (other,) = second.ask(Ask(PROMPT, salt="other"))
    (same,) = second.ask(Ask(PROMPT, salt="one"))
    assert other.report["reason"] == "miss" and reused(same) > 0
    assert counts(second)["asked_entries:remote_miss"] >= 4


def test_a_covered_range_ends_before_what_nobody_holds(make_engine: MakeEngine, remote: dict[str, Any]) -> None:
    first, second = make_engine(**remote), make_engine(**remote)
    show(first, A)
    assert first.session.lower.drain(20)
    (answer,) = second.ask(Ask([*OPEN, A, *BETWEEN, C, *CLOSE]))
    assert reused(answer) > 0 and second.encoded == [C.identifier]


def test_in_mode_exact_the_encoder_output_comes_from_the_store(make_engine: MakeEngine, remote: dict[str, Any]) -> None:
    first, second = make_engine(**remote), make_engine(**remote)
    show_and_write(first)
    (answer,) = second.ask(Ask(PROMPT, "exact"))
    assert reused(answer) == 0 and second.encoded == []


def test_in_mode_off_nothing_is_asked(make_engine: MakeEngine, remote: dict[str, Any]) -> None:
    engine = make_engine(**remote)
    engine.ask(Ask(PROMPT, "off"))
    assert not any(name.startswith("asked") for name in counts(engine))


def test_what_is_on_disk_is_not_asked_for(make_engine: MakeEngine, remote: dict[str, Any], tmp_path: Path) -> None:
    engine = make_engine(disk_path=str(tmp_path / "disk"), **remote)
    show_and_write(engine)
    before = counts(engine)
    drop_entries(engine)
    (answer,) = engine.ask(Ask(PROMPT))
    assert reused(answer) > 0 and answer.report["tier"] == "disk"
    after = counts(engine)
    assert before["asked_entries:remote_miss"] == after["asked_entries:remote_miss"]
    assert before["written_entries:remote"] == before["written_entries:disk"] == 6


def test_what_comes_from_the_store_is_kept_on_disk(
    make_engine: MakeEngine, remote: dict[str, Any], tmp_path: Path
) -> None:
    first, second = make_engine(**remote), make_engine(disk_path=str(tmp_path / "disk"), **remote)
    show_and_write(first)
    second.ask(Ask(PROMPT))
    assert second.session.lower.drain(20) and counts(second)["written_entries:disk"] == 4


def test_others_go_on_while_a_request_waits_for_an_answer(
    make_engine: MakeEngine, remote: dict[str, Any], gate: threading.Event
) -> None:
    engine = make_engine(**remote)
    waiting, other = engine.add(Ask(PROMPT)), engine.add(Ask(text("other", 30), max_tokens=5))
    while not engine.answers[other].is_finished:
        engine.step()
    assert not engine.answers[waiting].token_ids
    gate.set()
    engine.run()
    assert engine.answers[waiting].report["reason"] == "miss"


def test_a_request_waits_for_an_answer_no_longer_than_computing_would_take(
    make_engine: MakeEngine, remote: dict[str, Any], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetches, "MIN_WAIT_S", 0.0)
    engine = make_engine(**remote)
    set_prices(engine, compute=1e-6, encode=1e-6)
    (answer,) = engine.ask(Ask(PROMPT))
    assert answer.report["reason"] == "miss"
    gate.set()


@pytest.mark.parametrize("gate", ["ask", "read"], indirect=True)
def test_a_request_that_is_aborted_while_it_waits_leaves_nothing_behind(
    make_engine: MakeEngine, remote: dict[str, Any], gate: threading.Event
) -> None:
    first = make_engine(**remote)
    gate.set()
    show_and_write(first)
    gate.clear()
    engine = make_engine(**remote)
    name = engine.add(Ask(PROMPT))
    for _ in range(5):
        engine.step()
    engine.abort(name)
    engine.run()
    gate.set()
    (answer,) = engine.ask(Ask(PROMPT))
    assert reused(answer) > 0


def test_a_dead_store_costs_one_time_out_whatever_the_number_of_requests(
    make_engine: MakeEngine, remote: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(**remote)
    show_and_write(engine)
    waits: list[float] = []

    def dead(adapter: Adapter, fd: int, is_done: object) -> None:
        waits.append(time.monotonic())
        adapter._fail(AdapterTimeoutError("it is dead"))

    monkeypatch.setattr(Adapter, "_wait", dead)
    drop_entries(engine)
    engine.session.lower.tiers[0]._presence.clear()
    for salt in ("a", "b", "c"):
        for answer in engine.ask(Ask(PROMPT, salt=salt), Ask([*CLOSE, A, *OPEN], salt=salt)):
            assert answer.report["reason"] == "miss"
    assert engine.session.lower.drain(20)
    found = counts(engine)
    assert len(waits) == 1 and found["tier_failures:remote_timeout"] == found["tier_breaker:remote_opened"] == 1
    assert found["dropped_writes:error"] > 0
    monkeypatch.undo()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    engine.session.lower.tiers[0].refresh()
    (answer,) = engine.ask(Ask(PROMPT))
    assert reused(answer) > 0 and answer.report["tier"] == "remote", "what it holds without a salt is found again"


@pytest.mark.parametrize("how", ["removed", "cut", "flipped"])
def test_entries_that_the_store_lost_are_computed_and_written_again(
    make_engine: MakeEngine, remote: dict[str, Any], how: str
) -> None:
    first, second, third = (make_engine(**remote) for _ in range(3))
    show_and_write(first)
    second.session.lower.tiers[0].ask([])  # connected
    for path in blobs(remote):
        damage(path, how)
    (answer,) = second.ask(Ask(PROMPT))
    assert reused(answer) == 0
    assert (counts(second).get("lost_entries:remote", 0) > 0) == (how != "removed")
    for _ in range(2):
        assert second.session.lower.drain(20)
        second.forget()
        second.ask(Ask([*CLOSE, B, A, *OPEN], ratio=1.0))
    assert second.session.lower.drain(20)
    (answer,) = third.ask(Ask([*CLOSE, B, *OPEN]))
    assert reused(answer) > 0 and answer.report["tier"] == "remote"


def test_an_engine_without_what_the_option_needs_does_not_start(
    make_engine: MakeEngine, remote: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match="no_such_store"):
        make_engine(remote={"type": "no_such_store"})
