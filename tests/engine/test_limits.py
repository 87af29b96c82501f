"""Quotas, times to live and the trace, with vLLM's own scheduler: see `test_room`."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.conftest import MakeEngine
from engine.fake_engine import FakeEngine
from engine.fake_prompts import Ask, Image, text
from engine.scenes import CLOSE, PROMPT, A, B, C, drop_entries, reused, show
from engine.test_traffic import Weather, drive
from vlcache_connector.plan.keys import tenant_tag


def turn_clock(engine: FakeEngine, clock: Any) -> None:
    engine.session.index._order.clock = clock


def tenants(engine: FakeEngine) -> Counter[str]:
    """Bytes of entries by tenant."""
    found: Counter[str] = Counter()
    for entry in engine.session.index._entries.values():
        found[entry.entry_class.tenant] += entry.extent.nbytes
    return found


# -- quotas -----------------------------------------------------------------------------------------------------------


def test_a_busy_tenant_stays_within_its_quota_and_leaves_others_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(quotas={"tenant:busy": 0.1})
    show(engine)
    for number in range(30):
        engine.ask(Ask([*text("busy", 3), Image(f"picture {number}", 10), *CLOSE], salt="busy"))
    found = tenants(engine)
    assert 0 < found[tenant_tag("busy")] <= 0.1 * (1 << 20)
    assert engine.counts["evictions:quota"] > 0 and engine.counts["evictions:room"] == 0
    (answer,) = engine.ask(Ask(PROMPT))
    assert reused(answer) > 0, "an entry of somebody else left"


def test_each_kind_is_held_to_its_quota(make_engine: MakeEngine) -> None:
    engine = make_engine(quotas={"embedding": 0.05})
    for number in range(12):
        show(engine, Image(f"picture {number}", 10))
    kinds: Counter[str] = Counter()
    for entry in engine.session.index._entries.values():
        kinds[entry.entry_class.kind] += entry.extent.nbytes
    assert 0 < kinds["embedding"] <= 0.05 * (1 << 20)
    assert len([e for e in engine.session.index._entries.values() if e.entry_class.kind == "kv"]) == 12


# -- times to live ----------------------------------------------------------------------------------------------------


def test_an_image_whose_time_is_over_is_a_miss_and_learnt_again(make_engine: MakeEngine) -> None:
    engine = make_engine(ttl_s=60.0)
    now = 1e6
    turn_clock(engine, lambda: now)
    show(engine)
    now += 59
    assert reused(engine.ask(Ask(PROMPT))[0]) > 0
    engine.forget()
    now += 1
    (answer,) = engine.ask(Ask(PROMPT))
    assert answer.report["reason"] == "miss"
    assert engine.counts["evictions:expired"] > 0
    engine.forget()
    assert reused(engine.ask(Ask(PROMPT))[0]) > 0


def test_time_that_runs_out_between_look_up_and_admission_harms_nobody(make_engine: MakeEngine) -> None:
    """Whatever vLLM was told of in a step is carried out."""
    engine = make_engine(ttl_s=60.0)
    now = 1e6
    turn_clock(engine, lambda: now)
    side, encoder_side = engine.scheduler.connector._scheduler, engine.scheduler.ec_connector._scheduler

    def jump_after(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def jumping(*args: Any) -> Any:
            nonlocal now
            answer = original(*args)
            now += 100 if answer else 0
            return answer

        setattr(owner, name, jumping)

    show(engine)
    jump_after(side, "get_num_new_matched_tokens")
    assert reused(engine.ask(Ask(PROMPT))[0]) > 0
    engine.forget()
    drop_entries(engine)
    show(engine)
    jump_after(encoder_side, "has_cache_item")
    engine.scheduler.reset_encoder_cache()
    for worker in engine.workers:
        worker.encoder_cache.clear()
    num_encoded = len(engine.encoded)
    engine.ask(Ask([*text("exact", 5), A, *CLOSE], "exact"))
    assert len(engine.encoded) == num_encoded, "the encoder ran although its output was found"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("eviction", ["lru", "cost"])
def test_random_traffic_under_all_limits_is_answered(make_engine: MakeEngine, eviction: str, seed: int) -> None:
    limits = {"quotas": {"kv": 0.3, "tenant": 0.5, "embedding": 0.6}, "ttl_s": {"image": 80, "kv": 50}}
    engine = make_engine(num_blocks=100, max_batched_tokens=24, host_nbytes=400_000, eviction=eviction, **limits)
    turn_clock(engine, lambda: float(len(engine.steps)))
    aborted = drive(engine, random.Random(seed), 120, Weather())
    assert {name for name, answer in engine.answers.items() if not answer.is_finished} <= aborted
    assert engine.counts["hits"] > 5
    assert engine.counts["evictions:quota"] > 0 and engine.counts["evictions:expired"] > 0


# -- the trace --------------------------------------------------------------------------------------------------------


def events_of(engine: FakeEngine, path: Path) -> list[Any]:
    engine.session.trace.close()
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_the_trace_has_each_look_up_once_however_often_the_engine_asks(make_engine: MakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    engine = make_engine(num_blocks=26, trace_path=str(path))
    show(engine)
    holding = engine.add(Ask(text("long", 60), max_tokens=20))
    for _ in range(3):
        engine.step()
    waiting = engine.add(Ask(PROMPT, max_tokens=3))  # the pool is full: it is asked for in every step
    engine.run()
    assert engine.answers[holding].is_finished and reused(engine.answers[waiting]) > 0
    events = events_of(engine, path)
    by_op = Counter((event["op"], event["class"][0]) for event in events)
    assert by_op == {
        (op, kind): n for op, n in (("miss", 3), ("insert", 3), ("hit", 2)) for kind in ("kv", "embedding")
    }
    inserted = {event["key"]: event["nbytes"] for event in events if event["op"] == "insert"}
    assert all(inserted[event["key"]] == event["nbytes"] for event in events), "sizes of one entry differ"


def test_the_trace_tells_what_is_evicted_and_which_mode_looks_up_what(make_engine: MakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    engine = make_engine(trace_path=str(path), quotas={"kv": 0.0015})
    show(engine, A, B)
    engine.ask(Ask([*text("off", 3), C, *CLOSE], "off"), Ask([*text("exact", 3), B, *CLOSE], "exact", salt="other"))
    events = events_of(engine, path)
    assert Counter(event["reason"] for event in events if event["op"] == "evict")["quota"] > 0
    looked_up = [(event["op"], *event["class"][:2]) for event in events if event["class"][2]]
    assert ("miss", "embedding", "image") in looked_up
    assert ("miss", "kv", "image") not in looked_up, "an exact request looks up no KV"
    assert sum(event["op"] in ("hit", "miss") for event in events) == 5


def test_where_no_kv_is_reused_the_encoder_connector_tells_the_trace(make_engine: MakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    engine = make_engine(trace_path=str(path))
    engine.session.unsupported = "planted"
    for salt in (None, None, "other"):
        engine.scheduler.reset_encoder_cache()
        for worker in engine.workers:
            worker.encoder_cache.clear()
        engine.ask(Ask([*text("show", 3), A, *CLOSE], salt=salt))
        engine.forget()
    found = [(event["op"], event["class"][0], bool(event["class"][2])) for event in events_of(engine, path)]
    one = [("miss", "embedding", False), ("insert", "embedding", False), ("hit", "embedding", False)]
    assert found == [*one, ("miss", "embedding", True), ("insert", "embedding", True)]


def test_without_the_option_nothing_is_recorded(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine)
    assert engine.session.trace is None
