"""Requests that meet in one engine step, and what they may build on."""

from e2e import inside
from e2e.engine import Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, SCENES, A, B, answers_alone, bound, plain, show_pictures  # noqa: F401


def test_a_prefix_that_is_computed_in_this_very_step_is_not_built_upon(fresh: Engine, bound: float) -> None:  # noqa: F811
    """The very first test: two requests share a prefix, one of them reuses a picture, both start in the same step."""
    show_pictures(fresh)
    shared = [OPEN, LONG]
    text, reuse = (
        Ask([*shared, "only text", CLOSE], max_tokens=3),
        Ask([*shared, A, "what?", CLOSE], ratio=1.0, max_tokens=3),
    )
    expected = plain(fresh, reuse.parts)
    fresh.forget()
    fresh.call(inside.counters)
    _, answer = fresh.ask(text, reuse)
    assert fresh.call(inside.counters)["deferrals:running_step"] > 0
    assert answer.report["prefix_cached_tokens"] > 0, "after waiting a step, the prefix is a local hit"
    assert answer.report["recomputed_tokens"] > 0
    assert answer.gap(expected) <= bound


def test_a_reuse_request_waits_for_another_that_loads_the_same_prefix(fresh: Engine, bound: float) -> None:  # noqa: F811
    show_pictures(fresh)
    asks = [Ask([OPEN, LONG, A, "then", B, question, CLOSE], ratio=0.05) for question in ("same?", "which?")]
    alone = answers_alone(fresh, asks)
    for one, other in zip(alone, fresh.ask(*asks), strict=True):
        assert one.gap(other) <= bound


def test_passes_of_one_step_stay_within_the_engines_token_budget(fresh_bf16: Engine) -> None:
    """The engine batches at most 96 tokens; requests whose passes would go beyond that wait for the next step."""
    show_pictures(fresh_bf16)
    asks = [Ask(SCENES[name], ratio=1.0) for name in ("two in the other order", "text between", "three")]
    fresh_bf16.call(inside.counters)
    answers = fresh_bf16.ask(*asks)
    assert all(answer.report["recomputed_tokens"] > 0 for answer in answers)
    counts = fresh_bf16.call(inside.counters)
    assert counts["deferrals:step_budget"] > 0
    assert counts["passes"] >= counts["recomputed_tokens"] / 96


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
