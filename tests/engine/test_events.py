"""Requests that go away, start again, or whose loads fail: with vLLM's own scheduler, synchronous and asynchronous, on
one rank and on two.

Each engine is looked at when its test is over: no block, pin, job or request may be left (see `conftest`), and in every
step all that is read must have been written for just that (see `fake_worker`).
"""

import pytest

from engine.conftest import MakeEngine
from engine.fake_prompts import Ask, Image, text
from engine.scenes import BETWEEN, CLOSE, OPEN, PROMPT, A, C, drop_entries, fail, reused, show, steps_of
from vlcache_connector.engine.kv_scheduler import VLCacheScheduler

# -- requests that go away or start again -----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("when", ["between steps", "during a step"])
def test_an_aborted_request_gives_everything_back_at_any_stage(
    make_engine: MakeEngine, ratio: float, when: str
) -> None:
    engine = make_engine(max_batched_tokens=8)
    show(engine)
    ask = Ask([*PROMPT, C, *CLOSE], ratio=ratio, max_tokens=4)
    for stage in range(steps_of(engine, ask)):
        name = engine.add(ask)
        for _ in range(stage):
            engine.step()
        engine.abort(name) if when == "between steps" else engine.abort_during_step(name)
        engine.run()
        engine.check_idle()
        engine.forget()
    assert reused(*engine.ask(Ask(PROMPT))) > 0


def test_an_aborted_request_is_recomputed_no_further(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batched_tokens=8)
    show(engine)
    name = engine.add(Ask(PROMPT, ratio=1.0))
    for _ in range(3):
        engine.step()
    assert engine.status(name) == "WAITING_FOR_REMOTE_KVS"
    engine.abort(name)
    num_steps = len(engine.steps)
    engine.run()
    pieces = [piece for output in engine.steps[num_steps:] for piece in output.kv_connector_metadata.reuse]
    assert len(pieces) == 1 and not pieces[0].recomputed and pieces[0].is_last


def test_a_new_image_is_learnt_or_not_but_never_half_when_its_request_is_aborted(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batched_tokens=8)
    for stage in range(12):
        new = Image(f"new {stage}", 10)
        name = engine.add(Ask([*OPEN, new, *CLOSE]))
        for _ in range(stage):
            engine.step()
        engine.abort_during_step(name)
        engine.run()
        engine.check_idle()
        engine.forget()
        engine.ask(Ask([*BETWEEN, new, *CLOSE]))  # the workers look at what is loaded


@pytest.mark.parametrize("ratio", [0.05, 1.0])
def test_a_preempted_request_starts_again_at_any_stage(make_engine: MakeEngine, ratio: float) -> None:
    engine = make_engine(max_batched_tokens=16)
    show(engine)
    ask = Ask(PROMPT, ratio=ratio, max_tokens=8)
    num_preempted = 0
    for stage in range(steps_of(engine, ask)):
        name = engine.add(ask)
        for _ in range(stage):
            engine.step()
        if name in engine.scheduler.requests and engine.status(name) == "RUNNING":
            engine.preempt(name)
            num_preempted += 1
        engine.run()
        assert engine.answers[name].is_finished
        engine.check_idle()
        engine.forget()
    assert num_preempted >= 7


@pytest.mark.parametrize("loses_blocks", [False, True])
def test_a_preempted_request_reports_where_all_tokens_of_its_prompt_came_from(
    make_engine: MakeEngine, loses_blocks: bool
) -> None:
    engine = make_engine()
    show(engine)
    name = engine.add(Ask(PROMPT, max_tokens=12))
    while len(engine.answers[name].token_ids) < 7:
        engine.step()
    engine.preempt(name)
    if loses_blocks:
        engine.scheduler.kv_cache_manager.block_pool.evict_blocks(set(range(engine.size.num_blocks)))
    engine.run()
    report = engine.answers[name].report
    counts = [report[f"{kind}_tokens"] for kind in ("reused", "recomputed", "prefix_cached", "computed")]
    assert min(counts) >= 0 and sum(counts) == engine.truths[name].num_prompt
    assert report["reused_tokens"] > 0 and "reason" not in report, "the report is of the first admission"
    assert engine.counts["hits"] == 1, "the same request is not another hit"


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_a_preempted_request_whose_blocks_and_entries_are_gone_is_computed(make_engine: MakeEngine, kind: str) -> None:
    engine = make_engine(encoder_tokens=A.num_tokens)
    show(engine)
    name = engine.add(Ask(PROMPT, max_tokens=8))
    while not engine.answers[name].token_ids:
        engine.step()
    engine.preempt(name)
    drop_entries(engine, kind)
    engine.scheduler.kv_cache_manager.block_pool.evict_blocks(set(range(engine.size.num_blocks)))
    engine.run()  # vLLM has no pixels any more: embeddings that were needed once must still be there
    assert engine.answers[name].is_finished


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_load_that_fails_on_one_rank_in_any_piece_is_computed_and_read_by_nobody(
    make_engine: MakeEngine, ratio: float
) -> None:
    engine = make_engine(max_batched_tokens=8, max_requests=40)
    show(engine)
    for rank in range(engine.size.num_ranks):
        for piece in range(4):
            fail(engine, "piece", rank, after=piece)
            failing = engine.add(Ask(PROMPT, ratio=ratio))
            others = []
            for _ in range(8):  # with the same beginning, at every stage of the failure
                others += [engine.add(Ask([*PROMPT, *CLOSE], "reuse", ratio)), engine.add(Ask([*PROMPT, 1], "exact"))]
                engine.step()
            engine.run()
            failed = [name for name in (failing, *others) if engine.answers[name].report.get("reason") == "load_failed"]
            assert len(failed) == (1 if piece < 2 or ratio == 1.0 else len(failed))
            engine.check_idle()
            engine.forget()


def test_a_request_whose_load_failed_is_not_loaded_again(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine)
    fail(engine, "piece", engine.size.num_ranks - 1)
    (answer,) = engine.ask(Ask(PROMPT))
    assert answer.report["reason"] == "load_failed" and reused(answer) == 0 and not answer.report["approximate"]
    (answer,) = engine.ask(Ask(PROMPT, "exact"))
    assert answer.report["prefix_cached_tokens"] > 40, "what was computed instead is exact, and shared as such"
    (answer,) = engine.ask(Ask([*text("other", 5), *PROMPT]))
    assert reused(answer) > 0


def test_a_request_that_is_aborted_while_its_load_fails_gives_everything_back(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batched_tokens=8)
    show(engine)
    for stage in range(10):
        fail(engine, "piece", 0, times=100)
        name = engine.add(Ask(PROMPT, ratio=1.0))
        for _ in range(stage):
            engine.step()
        engine.abort_during_step(name)
        engine.run()
        engine.check_idle()
        engine.forget()


@pytest.mark.parametrize("stage", ["save", "compile"])
def test_an_entry_that_was_not_written_on_every_rank_is_not_found(make_engine: MakeEngine, stage: str) -> None:
    engine = make_engine()
    show(engine, A)
    for rank in range(engine.size.num_ranks):
        fail(engine, stage, rank, times=9)
        new = Image(f"new {rank}", 10)
        parts: list[int | Image] = [*OPEN, new, *CLOSE] if stage == "save" else [*OPEN, A, new, *CLOSE]
        engine.ask(Ask(parts))
        engine.forget()
        engine.is_struck = lambda *_: False
        (answer,) = engine.ask(Ask([*BETWEEN, new, *CLOSE]))
        assert answer.report["reason"] == "miss"
        (answer,) = engine.ask(Ask([*CLOSE, new, *CLOSE]))
        assert reused(answer) > 0, "but the next request has taught it"


def test_an_embedding_that_cannot_be_loaded_is_encoded_again(make_engine: MakeEngine) -> None:
    engine = make_engine(encoder_tokens=40)
    show(engine)
    engine.encoded.clear()
    fail(engine, "embedding", 0)
    engine.ask(Ask(PROMPT, "exact"))
    assert len(engine.encoded) == 1


def test_a_request_on_its_own_approximate_blocks_stays_approximate_when_planning_fails(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the new image would be stored as exact, and the report would be wrong."""
    engine = make_engine()
    show(engine)
    assert reused(*engine.ask(Ask(PROMPT))) > 0

    def broken(*_: object) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(VLCacheScheduler, "_plan", broken)
        (answer,) = engine.ask(Ask([*PROMPT, Image("new", 8), *CLOSE]))
    assert answer.report["approximate"] and answer.report["reused_tokens"] == 0
    engine.session.counters.take()
    assert engine.counts.pop("failures:look-up") > 0
