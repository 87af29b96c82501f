"""Requests that meet in one engine step, and what they may build on."""

import pytest

from e2e import inside
from e2e.engine import Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, SCENES, A, B, answers_alone, bound, bound_bf16, plain, show_pictures  # noqa: F401


def test_a_prefix_that_is_computed_in_this_very_step_is_built_upon_after_it(fresh: Engine, bound: float) -> None:  # noqa: F811
    """The very first test: two requests share a prefix, one of them reuses a picture, both start in the same step."""
    show_pictures(fresh)
    shared = [OPEN, LONG]
    text, reuse = (
        Ask([*shared, "only text", CLOSE], max_tokens=3),
        Ask([*shared, A, "what?", CLOSE], ratio=1.0, max_tokens=3),
    )
    expected = plain(fresh, reuse.parts)
    fresh.forget()
    _, answer = fresh.ask(text, reuse)
    assert answer.report["prefix_cached_tokens"] > 0, "the prefix, computed in this step, is a local hit"
    assert answer.report["recomputed_tokens"] > 0
    assert answer.gap(expected) <= bound


@pytest.mark.parametrize("policy", ["shifted", "leading"])
def test_reuse_requests_with_the_same_beginning_do_not_disturb_each_other(
    fresh: Engine,
    bound: float,  # noqa: F811
    policy: str,
) -> None:
    show_pictures(fresh)
    prompts = [[OPEN, LONG, A, "then", B, question, CLOSE] for question in ("same?", "which?")]
    asks = [Ask(parts, ratio=0.05, policy=policy) for parts in prompts]
    alone = answers_alone(fresh, asks)
    for one, other in zip(alone, fresh.ask(*asks), strict=True):
        assert one.gap(other) <= bound


def test_reuse_is_cut_into_pieces_that_leave_room_for_decoding(fresh_bf16: Engine, bound_bf16: float) -> None:  # noqa: F811
    """The engine batches at most 96 tokens: beside a request that decodes, no step takes on more than that."""
    show_pictures(fresh_bf16)
    decoding = Ask([OPEN, "tell a story", CLOSE], "off", max_tokens=16)
    asks = [Ask(SCENES[name], ratio=1.0) for name in ("two in the other order", "text between", "three")]
    expected = [plain(fresh_bf16, ask.parts) for ask in asks]
    fresh_bf16.forget()
    fresh_bf16.call(inside.watch_steps)
    answers = fresh_bf16.call(inside.drive, [(0, decoding), *((2, ask) for ask in asks)])[1:]
    steps = fresh_bf16.call(inside.watched_steps)
    assert max(scheduled + recomputed for scheduled, recomputed in steps) <= 96
    assert any(scheduled and recomputed for scheduled, recomputed in steps), "nothing decoded beside a pass"
    assert sum(recomputed for _, recomputed in steps) == sum(answer.report["recomputed_tokens"] for answer in answers)
    assert all(answer.gap(one) <= bound_bf16 for answer, one in zip(answers, expected, strict=True))


def test_how_far_tokens_move_does_not_depend_on_how_busy_the_engine_is(fresh_bf16: Engine) -> None:
    """No cut through a picture: what its samples say is the same in steps with much room and with little."""
    show_pictures(fresh_bf16)
    decoding = Ask([OPEN, LONG, "tell a story", CLOSE], "off", max_tokens=16)
    asks = {name: Ask(SCENES[name], ratio=0.2, policy="shifted") for name in ("two in the other order", "three")}
    pages = {}
    for is_busy in (False, True):
        fresh_bf16.forget()
        fresh_bf16.call(inside.watch_jobs)
        for name, ask in asks.items():
            fresh_bf16.call(inside.drive, [(0, decoding)] * is_busy + [(1, ask)])
            pages[name, is_busy] = fresh_bf16.call(inside.last_job)["pages"]
            fresh_bf16.forget()
    for name in asks:
        alone, busy = pages[name, False].float(), pages[name, True].float()
        # Sums of a pass come in another order when it holds other rows: the noise of bfloat16, through four layers.
        assert (alone - busy).norm() <= 0.01 * alone.norm()


def test_an_aborted_request_gives_back_what_its_reuse_held(fresh_bf16: Engine) -> None:
    """Aborted before, between and after the pieces of its reuse; the engine goes on, and no block or pin is lost."""
    show_pictures(fresh_bf16)
    free = fresh_bf16.call(inside.num_free_blocks)
    for steps in range(8):
        fresh_bf16.forget()
        fresh_bf16.call(inside.abort_after, Ask(SCENES["three"], ratio=1.0), steps)
        fresh_bf16.call(inside.run_idle)
        fresh_bf16.call(inside.check_store)
        assert fresh_bf16.call(inside.num_free_blocks) == free
    fresh_bf16.forget()
    assert fresh_bf16.ask_one(Ask(SCENES["three"], ratio=0.05)).report["reused_tokens"] > 0


def test_a_text_request_is_not_touched(fresh: Engine) -> None:
    fresh.call(inside.counters)
    answer = fresh.ask_one(Ask([OPEN, LONG, CLOSE], params={"mode": "reuse"}))
    assert answer.report["reused_tokens"] == 0 and answer.report["reason"] == "no_media"
    assert not any(name.startswith("declines") for name in fresh.call(inside.counters))


def test_requests_that_decode_go_on_beside_reuse(fresh: Engine, bound: float) -> None:  # noqa: F811
    """A text request and a picture request are decoding when two more requests with known pictures arrive."""
    show_pictures(fresh)
    asks = [
        (0, Ask([OPEN, "tell a story", CLOSE], "off", max_tokens=12)),
        (1, Ask([OPEN, "other ", A, "what?", CLOSE], ratio=1.0, max_tokens=12)),
        (3, Ask([OPEN, "late ", B, A, "which?", CLOSE], ratio=0.05, max_tokens=6)),
        (3, Ask([OPEN, LONG, A, "and?", CLOSE], ratio=1.0, max_tokens=6)),
    ]
    alone = answers_alone(fresh, [ask for _, ask in asks])
    for one, other in zip(alone, fresh.call(inside.drive, asks), strict=True):
        assert one.gap(other) <= bound
        assert one.token_ids == other.token_ids
        assert one.report["reused_tokens"] == other.report["reused_tokens"]
