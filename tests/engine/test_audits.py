"""Audits and the drift guard in an engine without a model: who is audited, when, and what is left over (nothing, see
`conftest`). What an audit finds is the test's choice; the workers check that a job has all it needs and harms nobody.
"""

import logging
import random

import pytest

from engine.conftest import MakeEngine
from engine.fake_engine import Answer, FakeEngine
from engine.fake_prompts import Ask, Image, text
from engine.scenes import CLOSE, OPEN, PROMPT, A, B, C, drop_entries, fail, reused, show
from engine.test_traffic import Weather, drive
from vlcache_connector.engine import audits
from vlcache_connector.engine.metadata import AuditJob
from vlcache_connector.plan.drift import MIN_TO_LOWER, MIN_TO_RAISE, WINDOW

GOOD, BAD = 0.001, 3.0


def engine_that_audits(make_engine: MakeEngine, **settings: object) -> FakeEngine:
    engine = make_engine(**{"audit_fraction": 1.0, "policy": "leading"} | settings)
    show(engine)
    engine.counts.clear()
    return engine


def ask_default(engine: FakeEngine, times: int = 1) -> list[Answer]:
    """The same request again and again, each from an empty prefix cache."""
    answers = []
    for _ in range(times):
        answers += engine.ask(Ask(PROMPT, ratio=None))
        engine.forget()
    return answers


def count(engine: FakeEngine, name: str) -> float:
    """Also what no step has handed over yet."""
    engine.session.counters.take()
    return float(engine.counts.get(name, 0))


def audited(engine: FakeEngine) -> int:
    return int(count(engine, "audits"))


def dropped(engine: FakeEngine, reason: str) -> int:
    return int(count(engine, f"dropped_audits:{reason}"))


def jobs(engine: FakeEngine) -> list[tuple[bool, AuditJob]]:
    """Of each audit: whether its step was idle, and the job."""
    return [
        (output.total_num_scheduled_tokens == 0 and not output.kv_connector_metadata.reuse, job)
        for output in engine.steps
        for job in output.kv_connector_metadata.audits
    ]


# -- who is audited, and when -----------------------------------------------------------------------------------------


def test_nothing_is_audited_unless_asked_for(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine)
    engine.ask(Ask(PROMPT, ratio=None))
    assert jobs(engine) == [] and "audits" not in engine.counts


@pytest.mark.parametrize("policy", ["leading", "shifted"])
def test_a_reused_request_is_audited_once_the_engine_is_idle(make_engine: MakeEngine, policy: str) -> None:
    engine = engine_that_audits(make_engine, policy=policy)
    engine.audited = lambda job: 0.25
    (answer,) = ask_default(engine)
    assert reused(answer) > 0
    ((is_idle, job),) = jobs(engine)
    assert is_idle
    assert sum(len(run) for span in job.piece.spans for run in span.reused) == reused(answer)
    assert job.piece.shifts == (policy == "shifted")
    assert engine.counts["audits"] == 1 and engine.counts["drift_kl"] == [0.25]
    assert engine.counts["drift_kv:0"] == pytest.approx(0.5), "of keys and of values, whatever the number of ranks"


def test_requests_without_reuse_are_not_audited(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine)
    engine.ask(Ask(PROMPT, "exact"), Ask(PROMPT, "off"), Ask([*OPEN, Image("new", 12), *CLOSE]), Ask(PROMPT, ratio=1.0))
    assert jobs(engine) == []


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_share_of_requests_is_audited_and_the_choice_can_be_repeated(
    make_engine: MakeEngine, fraction: float
) -> None:
    chosen = []
    for _ in range(2):
        engine = engine_that_audits(make_engine, audit_fraction=fraction)
        ask_default(engine, 40)
        chosen.append([job.request_id for _, job in jobs(engine)])
    assert chosen[0] == chosen[1]
    assert 40 * fraction / 2 <= len(chosen[0]) <= 40 * fraction * 3 / 2


def test_audits_wait_while_the_engine_has_work(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine)
    busy = engine.add(Ask([*OPEN, *text("busy", 10)], max_tokens=30))
    engine.add(Ask(PROMPT, ratio=None))
    while not engine.answers[busy].is_finished:
        assert jobs(engine) == []
        engine.step()
    engine.run()
    assert [is_idle for is_idle, _ in jobs(engine)] == [True]


def test_a_prompt_behind_an_exact_prefix_is_audited_as_it_was(make_engine: MakeEngine) -> None:
    """What was computed for the prefix is computed in both versions, and so is a new image behind the known ones."""
    engine = engine_that_audits(make_engine)
    prompt: list[int | Image] = [*OPEN, B, *CLOSE, A, *OPEN]
    engine.ask(Ask([*OPEN, B, *CLOSE], "exact"))
    (answer,) = engine.ask(Ask([*prompt, Image("new", 9), *CLOSE], ratio=None))
    assert answer.report["prefix_cached_tokens"] > len(OPEN) + B.num_tokens
    ((_, job),) = jobs(engine)
    assert [span.length for span in job.piece.spans] == [A.num_tokens]
    assert [job.piece.prompt.item(offset).length for offset, _ in job.embeddings] == [B.num_tokens, 9]


# -- never in the way -------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine)
    engine.add(Ask(text("busy", 3), max_tokens=40))
    for number in range(audits._MAX_QUEUED + 3):
        engine.add(Ask([*text(number, 3), *PROMPT], ratio=None, max_tokens=1))
    engine.run()
    assert audited(engine) == audits._MAX_QUEUED and dropped(engine, "queue_full") == 3


def test_evicted_entries_are_not_waited_for(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine)
    name = engine.add(Ask(PROMPT, ratio=None))
    while not engine.answers[name].token_ids:
        engine.step()
    drop_entries(engine, "kv")
    engine.run()
    assert audited(engine) == 0 and dropped(engine, "gone") == 1


def test_a_pool_without_room_is_left_alone(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine, num_blocks=24)
    (answer,) = ask_default(engine)
    assert reused(answer) > 0 and dropped(engine, "no_blocks") == 1


def test_a_prompt_of_too_many_passes_is_left_alone(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine, max_batched_tokens=8)
    (answer,) = ask_default(engine)
    assert reused(answer) > 0 and dropped(engine, "too_long") == 1


@pytest.mark.parametrize("is_last", [False, True])
def test_an_audit_that_fails_on_a_rank_is_dropped(make_engine: MakeEngine, is_last: bool) -> None:
    engine = engine_that_audits(make_engine)
    rank = engine.size.num_ranks - 1 if is_last else 0
    engine.audited = lambda job: BAD
    fail(engine, "audit", rank, times=100)
    assert all(reused(answer) > 0 for answer in ask_default(engine, 2 * MIN_TO_RAISE))
    assert audited(engine) == 0 and dropped(engine, "failed") == 2 * MIN_TO_RAISE


def test_an_aborted_request_may_still_be_audited(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine)
    name = engine.add(Ask(PROMPT, ratio=None, max_tokens=9))
    while not engine.answers[name].token_ids:
        engine.step()
    engine.abort(name)
    engine.run()
    assert audited(engine) == 1


def test_a_reset_forgets_audits_that_wait_or_are_under_way(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine)
    for number in range(3):
        engine.add(Ask([*text(number, 3), *PROMPT], ratio=None, max_tokens=1))
    while not jobs(engine):
        engine.step()
    before = audited(engine)
    engine.scheduler.reset_connector_cache()
    engine.run()
    assert audited(engine) == before and before + dropped(engine, "reset") == 3


# -- the guard --------------------------------------------------------------------------------------------------------


def ratio_of(engine: FakeEngine) -> float:
    """What the gauge shows, once it has changed."""
    return count(engine, "recompute_ratio") or engine.session.options.recompute_ratio


def test_drift_raises_the_ratio_and_then_switches_reuse_off_and_good_audits_bring_it_back(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_that_audits(make_engine, recompute_ratio=0.2)
    engine.audited = lambda job: BAD
    recomputed, ratios = [], []
    with caplog.at_level(logging.WARNING, logger=audits.logger.name):
        while reused(answer := ask_default(engine)[0]):
            recomputed.append(answer.report["recomputed_tokens"])
            ratios.append(ratio_of(engine))
    assert answer.report["reason"] == "drift" and engine.counts["declines:drift"] == 1
    assert recomputed == sorted(recomputed) and recomputed[0] < recomputed[-1]
    assert sorted(set(ratios)) == [0.2, 0.4, 0.5, 1.0] and ratio_of(engine) == 1.0
    lines = [record.getMessage() for record in caplog.records if "drift guard" in record.getMessage()]
    assert len(lines) == 3 and "raised from 0.2 to 0.4" in lines[0] and "switched off" in lines[2]

    engine.audited = lambda job: GOOD
    assert not any(reused(answer) for answer in ask_default(engine, MIN_TO_LOWER - 2))
    answers = ask_default(engine, 6 * WINDOW)
    assert all(reused(answer) > 0 for answer in answers[WINDOW:]) and ratio_of(engine) == 0.2
    assert answers[-1].report["recomputed_tokens"] == recomputed[0]


def switch_off(engine: FakeEngine) -> None:
    engine.audited = lambda job: BAD
    while reused(ask_default(engine)[0]):
        pass


def test_while_reuse_is_off_exact_requests_embeddings_and_saves_go_on(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine, recompute_ratio=0.5)
    switch_off(engine)
    num_encoded = len(engine.encoded)
    own, exact = engine.ask(Ask(PROMPT, ratio=0.2), Ask([*text(1, 5), *PROMPT], "exact"))
    assert own.report["reason"] == "drift" and exact.report["reason"] == "mode"
    assert len(engine.encoded) == num_encoded, "stored embeddings serve both"
    new = Image("new while off", 10)
    engine.ask(Ask([*OPEN, new, *CLOSE], ratio=None))
    engine.forget()
    (full,) = engine.ask(Ask([*OPEN, A, *CLOSE], ratio=1.0))
    assert full.report["recomputed_tokens"] > 0 and "reason" not in full.report, "full recomputation has no drift"
    engine.scheduler.reset_connector_cache()
    show(engine, A, B, C)
    assert reused(ask_default(engine)[0]) > 0, "new entries, new luck"


def test_what_was_learnt_while_reuse_was_off_is_reused_afterwards(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine, recompute_ratio=0.5)
    switch_off(engine)
    new = Image("new while off", 10)
    engine.ask(Ask([*OPEN, new, *CLOSE], ratio=None))
    engine.audited = lambda job: GOOD
    ask_default(engine, WINDOW + 1)
    (answer,) = engine.ask(Ask([*text(2, 7), new, *CLOSE], ratio=None))
    assert reused(answer) > 0


def test_requests_with_a_ratio_of_their_own_keep_it_and_do_not_move_the_guard(make_engine: MakeEngine) -> None:
    engine = engine_that_audits(make_engine, recompute_ratio=0.2)
    engine.audited = lambda job: BAD
    for _ in range(3 * MIN_TO_RAISE):
        engine.ask(Ask(PROMPT, ratio=0.05))
        engine.forget()
    assert audited(engine) == 3 * MIN_TO_RAISE and ratio_of(engine) == 0.2
    before = engine.ask(Ask(PROMPT, ratio=0.05))[0]
    engine.forget()
    while ratio_of(engine) != 0.5:
        ask_default(engine)
    after = engine.ask(Ask(PROMPT, ratio=0.05))[0]
    assert after.report["recomputed_tokens"] == before.report["recomputed_tokens"]


# -- random traffic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("space", ["roomy", "tight"])
def test_random_traffic_with_audits_is_answered_and_leaves_nothing_behind(
    make_engine: MakeEngine, seed: int, space: str
) -> None:
    rng = random.Random(seed)
    sizes = {
        "roomy": {"num_blocks": 400, "max_batched_tokens": 64, "host_nbytes": 1 << 20},
        "tight": {"num_blocks": 60, "max_batched_tokens": 32, "host_nbytes": 350_000, "max_requests": 8},
    }
    engine = make_engine(**sizes[space], keeps_pixels=True, audit_fraction=1.0, recompute_ratio=0.3)
    moods = iter(lambda: rng.choice([0.0, 0.05, 0.3]), None)
    mood = next(moods)

    def audited_now(job: object) -> float:
        nonlocal mood
        mood = next(moods) if rng.random() < 0.05 else mood
        return mood

    engine.audited = audited_now
    aborted = drive(engine, rng, 160, Weather(arrivals=0.07))
    assert {name for name, answer in engine.answers.items() if not answer.is_finished} <= aborted
    assert audited(engine) >= 3 and dropped(engine, "failed") + dropped(engine, "reset") + dropped(engine, "gone") > 0
