"""Entries that come back from the disk tier: after a restart, after eviction, late, or not at all.

What is fetched is compared byte by byte with what was stored, on every rank, in the step that reads it (`fake_worker`).
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.conftest import MakeEngine
from engine.fake_prompts import Ask, text
from engine.scenes import BETWEEN, CLOSE, OPEN, PROMPT, A, B, C, counts, drop_entries, reused, set_prices, show
from engine.tier_scenes import damage, held_back, show_and_write
from vlcache_connector.engine import fetches
from vlcache_connector.store.disk.tier import DiskTier


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    return {"disk_path": str(tmp_path / "disk")}


@pytest.fixture(params=["read"])
def gate(request: Any) -> Iterator[threading.Event]:
    """Reads from disk, or writes to it, wait until it is set."""
    with held_back(DiskTier, request.param) as event:
        yield event


def files(disk: dict[str, Any]) -> list[Path]:
    return [path for path in Path(disk["disk_path"]).rglob("*") if path.is_file()]


def test_images_are_found_again_after_a_restart(make_engine: MakeEngine, disk: dict[str, Any]) -> None:
    first = make_engine(**disk)
    show_and_write(first)
    first.stop()
    second = make_engine(**disk)
    (answer,) = second.ask(Ask(PROMPT))
    assert reused(answer) > 0 and answer.report["tier"] == "disk" and second.encoded == []
    second.forget()
    (answer,) = second.ask(Ask([*CLOSE, A, B, *OPEN]))
    assert reused(answer) > 0 and answer.report["tier"] == "host"
    assert counts(second)["read_entries:disk"] == 4, "an entry is brought up once"


def test_what_was_evicted_from_host_memory_comes_back_from_disk(make_engine: MakeEngine, disk: dict[str, Any]) -> None:
    engine = make_engine(**disk)
    show_and_write(engine)
    before = list(engine.encoded)
    drop_entries(engine)
    (answer,) = engine.ask(Ask(PROMPT))
    assert reused(answer) > 0 and answer.report["tier"] == "disk" and engine.encoded == before


def test_another_tenant_finds_nothing_on_disk(make_engine: MakeEngine, disk: dict[str, Any]) -> None:
    first = make_engine(**disk)
    show_and_write(first, salt="one")
    first.stop()
    second = make_engine(**disk)
    (other,) = second.ask(Ask(PROMPT, salt="other"))
    (same,) = second.ask(Ask(PROMPT, salt="one"))
    assert other.report["reason"] == "miss" and reused(same) > 0


def test_in_mode_exact_the_encoder_output_comes_from_disk(make_engine: MakeEngine, disk: dict[str, Any]) -> None:
    first = make_engine(**disk)
    show_and_write(first)
    first.stop()
    second = make_engine(**disk)
    (answer,) = second.ask(Ask(PROMPT, "exact"))
    assert reused(answer) == 0 and second.encoded == []
    assert counts(second)["read_entries:disk"] == 2


def test_in_mode_off_nothing_is_read(make_engine: MakeEngine, disk: dict[str, Any]) -> None:
    first = make_engine(**disk)
    show_and_write(first)
    first.stop()
    second = make_engine(**disk)
    second.ask(Ask(PROMPT, "off"))
    assert "read_entries:disk" not in counts(second) and sorted(set(second.encoded)) == sorted(
        {A.identifier, B.identifier}
    )


@pytest.mark.parametrize("how", ["removed", "cut", "flipped"])
def test_entries_that_disk_lost_are_computed_and_written_again(
    make_engine: MakeEngine, disk: dict[str, Any], how: str
) -> None:
    first = make_engine(**disk)
    show_and_write(first)
    first.stop()
    second = make_engine(**disk)
    for path in files(disk):
        damage(path, how)
    (answer,) = second.ask(Ask(PROMPT))
    assert reused(answer) == 0 and counts(second)["lost_entries:disk"] > 0
    for _ in range(2):  # what was still being read when its image was computed is learnt at the next occasion
        assert second.session.lower.drain(10)
        second.forget()
        second.ask(Ask([*CLOSE, B, A, *OPEN], ratio=1.0))
    assert second.session.lower.drain(10)
    second.forget()
    drop_entries(second)
    (answer,) = second.ask(Ask([*CLOSE, B, *OPEN]))
    assert reused(answer) > 0 and answer.report["tier"] == "disk"


def test_others_go_on_while_a_request_waits_for_the_disk(
    make_engine: MakeEngine, disk: dict[str, Any], gate: threading.Event
) -> None:
    engine = make_engine(**disk)
    show_and_write(engine)
    drop_entries(engine)
    waiting, other = engine.add(Ask(PROMPT)), engine.add(Ask(text("other", 30), max_tokens=5))
    while not engine.answers[other].is_finished:
        engine.step()
    assert not engine.answers[waiting].token_ids
    gate.set()
    engine.run()
    assert reused(engine.answers[waiting]) > 0


def test_two_requests_wait_for_one_fetch(make_engine: MakeEngine, disk: dict[str, Any], gate: threading.Event) -> None:
    engine = make_engine(**disk)
    show_and_write(engine)
    drop_entries(engine)
    names = [engine.add(Ask(PROMPT)), engine.add(Ask([*CLOSE, A, *OPEN]))]
    for _ in range(5):
        engine.step()
    gate.set()
    engine.run()
    assert all(reused(engine.answers[name]) > 0 for name in names)
    assert counts(engine)["read_entries:disk"] == 4


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing_behind(
    make_engine: MakeEngine, disk: dict[str, Any], gate: threading.Event
) -> None:
    engine = make_engine(**disk)
    show_and_write(engine)
    drop_entries(engine)
    name = engine.add(Ask(PROMPT))
    for _ in range(5):
        engine.step()
    engine.abort(name)
    engine.run()
    gate.set()
    (answer,) = engine.ask(Ask(PROMPT))
    assert reused(answer) > 0


def test_a_request_does_not_wait_for_a_slow_disk_for_long(
    make_engine: MakeEngine, disk: dict[str, Any], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetches, "MAX_WAIT_S", 0.05)
    engine = make_engine(**disk)
    show_and_write(engine)
    drop_entries(engine)
    (answer,) = engine.ask(Ask(PROMPT))
    assert reused(answer) == 0 and answer.report["reason"] == "miss"
    gate.set()


def test_caches_that_are_reset_while_entries_are_on_their_way_stay_empty(
    make_engine: MakeEngine, disk: dict[str, Any], gate: threading.Event
) -> None:
    engine = make_engine(**disk)
    show_and_write(engine)
    drop_entries(engine)
    name = engine.add(Ask(PROMPT))
    for _ in range(5):
        engine.step()
    engine.abort(name)
    engine.change_weights("wait")
    gate.set()
    assert engine.session.lower.drain(10)
    (answer,) = engine.ask(Ask(PROMPT))
    assert answer.report["reason"] == "miss"
    assert len(engine.session.index) == 4, "only what the last request saved"


def test_entries_of_other_weights_are_not_found_after_a_restart(make_engine: MakeEngine, disk: dict[str, Any]) -> None:
    """What was computed after an update belongs to weights that nobody can name any more."""
    first = make_engine(**disk)
    first.change_weights("wait")
    show_and_write(first)
    first.stop()
    second = make_engine(**disk)
    (answer,) = second.ask(Ask(PROMPT))
    assert answer.report["reason"] == "miss"


@pytest.mark.parametrize("gate", ["write"], indirect=True)
def test_writes_that_do_not_fit_into_the_queue_are_dropped_and_counted(
    make_engine: MakeEngine, disk: dict[str, Any], gate: threading.Event
) -> None:
    engine = make_engine(**disk)
    engine.session.lower._max_unwritten_nbytes = 1
    show(engine)
    assert counts(engine)["dropped_writes:queue_full"] == 5, "one of six is always let through"
    gate.set()


def test_a_host_tier_without_room_takes_nothing_from_disk(make_engine: MakeEngine, disk: dict[str, Any]) -> None:
    first = make_engine(**disk)
    show_and_write(first)
    first.stop()
    small = make_engine(host_nbytes=1 << 10, **disk)
    (answer,) = small.ask(Ask(PROMPT))
    assert reused(answer) == 0 and counts(small)["dropped_reads"] > 0


def test_a_folder_that_cannot_be_used_costs_only_the_disk_tier(make_engine: MakeEngine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = make_engine(disk_path=str(tmp_path / "file"))
    show(engine)
    (answer,) = engine.ask(Ask(PROMPT))
    assert not engine.session.lower.tiers and reused(answer) > 0


def test_a_later_image_waits_for_its_encoder_output_alone(make_engine: MakeEngine, disk: dict[str, Any]) -> None:
    """Its KV is nowhere, so it is computed behind the reused one, from the encoder output on disk."""
    engine = make_engine(**disk)
    show_and_write(engine)
    before = list(engine.encoded)
    drop_entries(engine)
    for path in files(disk):
        if f".kv{C.num_tokens}." in path.name:
            path.unlink()
    (answer,) = engine.ask(Ask([*OPEN, A, *BETWEEN, C, *CLOSE]))
    assert reused(answer) > 0 and engine.encoded == before


def test_a_request_waits_no_longer_than_computing_would_take(
    make_engine: MakeEngine, disk: dict[str, Any], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes too late for it is there for the next one."""
    monkeypatch.setattr(fetches, "MIN_WAIT_S", 0.0)
    engine = make_engine(**disk)
    show_and_write(engine)
    drop_entries(engine)
    set_prices(engine, compute=1e-6, encode=1e-6)
    (answer,) = engine.ask(Ask(PROMPT))
    assert reused(answer) == 0
    gate.set()
    assert engine.session.lower.drain(10)
    engine.forget()
    (answer,) = engine.ask(Ask(PROMPT))
    assert reused(answer) > 0 and counts(engine)["read_entries:disk"] == 4


def test_entries_that_are_cleared_on_their_way_up_are_fetched_once_more(
    make_engine: MakeEngine, disk: dict[str, Any], gate: threading.Event
) -> None:
    """As `vlcache clear --tier host` does; the first fetch ends while the second is under way."""
    engine = make_engine(**disk)
    show_and_write(engine)
    drop_entries(engine)
    name = engine.add(Ask(PROMPT))
    for _ in range(5):
        engine.step()
    with engine.session.lock:
        engine.session.index.clear()
    for _ in range(5):
        engine.step()
    gate.set()
    engine.run()
    assert reused(engine.answers[name]) > 0
    assert not any(count.startswith("failures") for count in counts(engine))
