"""The policy `scored`: what the workers are told of the question, and that what one question chose serves no other."""

import pytest

from engine.conftest import MakeEngine
from engine.fake_config import BLOCK_SIZE
from engine.fake_engine import FakeEngine
from engine.fake_prompts import Ask, Image, text
from engine.scenes import BETWEEN, OPEN, A, B, C, reused, show
from vlcache_connector.engine.fetches import Fetches
from vlcache_connector.engine.kv_scheduler import VLCacheScheduler
from vlcache_connector.engine.loads import LoadQueue
from vlcache_connector.engine.metadata import ReusePiece
from vlcache_connector.engine.questions import Lent, lend
from vlcache_connector.engine.requests import RequestState
from vlcache_connector.engine.session import SchedulerSession
from vlcache_connector.plan.planner import plan_reuse
from vlcache_connector.store.host import HostIndex
from vlcache_connector.types import Measure, ReusePlan, Run

KNOWN: list[int | Image] = [*OPEN, B, *BETWEEN, A]
COVERED = len(OPEN) + B.num_tokens + len(BETWEEN) + A.num_tokens


def pieces_of(engine: FakeEngine) -> list[ReusePiece]:
    return [piece for output in engine.steps for piece in output.kv_connector_metadata.reuse]


@pytest.mark.parametrize("num_tokens", [1, 9, 256, 300])
def test_the_question_is_what_follows_the_last_known_image(make_engine: MakeEngine, num_tokens: int) -> None:
    engine = make_engine(num_blocks=400)
    show(engine, A, B)
    engine.ask(Ask([*KNOWN, *text("question", num_tokens)], policy="scored", ratio=0.1))
    (piece,) = pieces_of(engine)
    end = COVERED + num_tokens
    assert piece.measure is Measure.ATTENTION and piece.question == Run(max(COVERED, end - 256), end)
    assert len(piece.prompt.token_ids) == end
    assert len(set(piece.block_ids)) == len(piece.block_ids) == -(-end // BLOCK_SIZE), "blocks are lent for it"
    assert [span.narrowings[0].count for span in piece.spans] == [2, 3], "of 12 and 21 tokens, rounded up"


def test_a_question_ends_where_the_next_image_begins(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=400)
    show(engine, A, B)
    engine.ask(Ask([*KNOWN, *text("question", 5), C, *text("more", 5)], policy="scored", ratio=0.1))
    (piece,) = pieces_of(engine)
    assert piece.question == Run(COVERED, COVERED + 5)


def test_without_room_for_the_question_there_is_none(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=400)
    show(engine, A, B)
    state = engine.scheduler.connector._scheduler._states[
        engine.add(Ask([*KNOWN, *text("question", 90)], policy="scored", ratio=0.1))
    ]
    num_tokens, policy = state.request.num_tokens, engine.session.policies["scored"]
    plan = plan_reuse(state.spans, [True, True], num_tokens, 0, policy, 0.1, 1)
    assert isinstance(plan, ReusePlan)
    pool, num_blocks = engine.scheduler.kv_cache_manager.block_pool, -(-COVERED // BLOCK_SIZE)
    missing = -(-(COVERED + 90) // BLOCK_SIZE) - num_blocks
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - missing)
    lent = lend(state, plan, num_blocks, pool, BLOCK_SIZE)
    assert lent.question == Run(COVERED, COVERED + 90) and len(lent.block_ids) == missing
    assert lend(state, plan, num_blocks, pool, BLOCK_SIZE) == Lent(), "there are no more"
    pool.free_blocks([*taken, *lent.blocks])
    engine.run()


@pytest.mark.parametrize(
    "broken",
    [
        (RequestState, "prompt"),
        (LoadQueue, "add"),
        (HostIndex, "get_found"),
        (SchedulerSession, "new_job"),
        (VLCacheScheduler, "_hold_embeddings"),
        (Fetches, "release"),
    ],
    ids=lambda broken: broken[1],
)
def test_what_was_lent_comes_back_when_anything_fails_behind_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, broken: tuple[type, str]
) -> None:
    """A first call that raises is followed by a request whose load has failed, and by an engine that is at rest."""
    engine = make_engine(num_blocks=400)
    show(engine, A, B)
    owner, name = broken
    works, num_calls = getattr(owner, name), 0

    def fails_first(*args: object, **kwargs: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("planted")
        return works(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails_first)
        (answer,) = engine.ask(Ask([*KNOWN, *text("question", 90)], policy="scored", ratio=0.1))
    assert num_calls > 0 and answer.report["reason"] == "load_failed" and reused(answer) == 0
    assert engine.num_free_blocks == engine.num_free_at_start, "lent blocks were lost"
    engine.session.counters.take()
    assert engine.counts.pop("failures:reuse") == 1


def test_other_policies_do_not_ask_what_the_question_is(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=400)
    show(engine, A, B)
    engine.ask(Ask([*KNOWN, *text("question", 5)], policy="leading", ratio=0.1))
    assert all(piece.question is None and len(piece.prompt.token_ids) == COVERED for piece in pieces_of(engine))


@pytest.mark.parametrize(("policy", "is_shared"), [("scored", False), ("leading", True)])
def test_what_one_question_chose_serves_no_other(make_engine: MakeEngine, policy: str, is_shared: bool) -> None:
    engine = make_engine(num_blocks=400)
    show(engine, A, B)
    first, same, other = (
        Ask([*KNOWN, *text(name, 40)], policy=policy, ratio=0.1) for name in ("one", "one", "another")
    )
    (answer,) = engine.ask(first)
    assert reused(answer) > 0 and answer.report["prefix_cached_tokens"] == 0
    (answer,) = engine.ask(same)
    assert answer.report["prefix_cached_tokens"] > COVERED, "the same prompt finds its own blocks again"
    (answer,) = engine.ask(other)
    assert (answer.report["prefix_cached_tokens"] > len(OPEN)) == is_shared
    assert reused(answer) > 0 or is_shared


def test_an_audit_repeats_the_question(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=400, audit_fraction=1.0, policy="scored", recompute_ratio=0.1)
    show(engine, A, B)
    engine.ask(Ask([*KNOWN, *text("question", 9)], ratio=None))
    (job,) = (job for output in engine.steps for job in output.kv_connector_metadata.audits)
    assert job.piece.measure is Measure.ATTENTION and job.piece.question == Run(COVERED, COVERED + 9)


def test_a_list_of_ratios_must_have_one_for_each_layer(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=400)
    show(engine, A, B)
    prompt = [*KNOWN, *text("question", 9)]
    (answer,) = engine.ask(Ask(prompt, policy="leading", ratio=[0.5]))  # type: ignore[arg-type]
    assert reused(answer) > 0
    (answer,) = engine.ask(Ask(prompt, policy="leading", ratio=[0.5, 0.5]))  # type: ignore[arg-type]
    assert answer.report["reason"] == "invalid_options" and "this model has 1 layers" in answer.report["error"]
