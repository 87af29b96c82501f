"""Prices that the running engine measures, the plan that a response explains, and reuse that would not pay."""

from e2e import inside
from e2e.engine import Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, A, B, bound, plain, show_pictures  # noqa: F401

PROMPT = [OPEN, LONG, A, "and", B, "which?", CLOSE]


def test_the_engine_measures_what_its_work_costs(fresh: Engine) -> None:
    """Only work of many tokens is measured: long plain prompts, long passes, and loads of many rows."""
    show_pictures(fresh)
    fresh.call(inside.forget_prices)
    assert set(fresh.call(inside.prices).values()) == {None}
    pictures = [A, B] * 3
    for number in range(4):
        fresh.forget()
        fresh.ask_one(Ask([OPEN, f"{number} ", LONG, *pictures, CLOSE], "off"))
        fresh.forget()
        fresh.ask_one(Ask([OPEN, f"{number} ", LONG, *pictures, CLOSE], ratio=0.0))
        fresh.forget()
        fresh.ask_one(Ask([OPEN, f"{number} ", LONG, *pictures, CLOSE], ratio=1.0))
    prices = fresh.call(inside.prices)
    assert 0 < prices["load"] < prices["recompute"], "a token costs more to recompute than to load"
    assert 0 < prices["load"] < prices["compute"]
    assert prices["encode"] > 0


def test_reuse_that_costs_more_than_computing_is_declined(fresh: Engine, bound: float) -> None:  # noqa: F811
    show_pictures(fresh)
    expected = plain(fresh, PROMPT)
    fresh.forget()
    fresh.call(inside.set_prices, {"compute": 1.0, "recompute": 10.0, "load": 1.0})
    answer = fresh.ask_one(Ask(PROMPT, params={"recompute_ratio": 0.05, "explain": True}))
    assert answer.report["reason"] == "no_gain" and answer.report["reused_tokens"] == 0
    assert answer.gap(expected) <= bound
    seconds = answer.report["plan"]["expected_s"]
    assert seconds["reuse"] > seconds["compute"]

    fresh.forget()
    fresh.call(inside.set_prices, {"compute": 10.0, "recompute": 10.0, "load": 1.0})
    assert fresh.ask_one(Ask(PROMPT, params={"recompute_ratio": 0.05})).report["reused_tokens"] > 0


def test_long_new_text_before_a_small_known_picture_is_left_to_the_engine(fresh: Engine, bound: float) -> None:  # noqa: F811
    """Where recomputing a token costs twice as much as computing it, the text eats up what the picture saves."""
    show_pictures(fresh)
    long = [OPEN, LONG, LONG, LONG, A, "what is it?", CLOSE]
    expected = plain(fresh, long)
    fresh.forget()
    fresh.call(inside.set_prices, {"compute": 1.0, "recompute": 2.0, "load": 0.01})
    answer = fresh.ask_one(Ask(long, params={"recompute_ratio": 0.05}))
    assert answer.report["reason"] == "no_gain" and answer.gap(expected) <= bound
    fresh.forget()
    short = Ask([OPEN, A, "what is it?", CLOSE], params={"recompute_ratio": 0.05})
    assert fresh.ask_one(short).report["reused_tokens"] > 0
    fresh.forget()
    fresh.ask_one(Ask([OPEN, LONG, LONG, LONG], "off"))
    answer = fresh.ask_one(Ask(long, params={"recompute_ratio": 0.05}))
    assert answer.report["reused_tokens"] > 0 and answer.report["prefix_cached_tokens"] > 100, (
        "text that is cached is free"
    )


def test_a_response_explains_its_plan_when_asked(fresh: Engine) -> None:
    show_pictures(fresh)
    assert "plan" not in fresh.ask_one(Ask(PROMPT, ratio=0.05)).report
    fresh.forget()
    report = fresh.ask_one(Ask(PROMPT, params={"recompute_ratio": 0.05, "explain": True})).report
    plan = report["plan"]
    assert [span["is_known"] for span in plan["spans"]] == [True, True]
    reused = sum(end - start for span in plan["spans"] for start, end in span["reused"])
    recomputed = sum(end - start for start, end in plan["recomputed"])
    assert (reused, recomputed) == (report["reused_tokens"], report["recomputed_tokens"])
    start, end = plan["covered"]
    assert start == report["prefix_cached_tokens"] and end - start == reused + recomputed
    for span in plan["spans"]:
        covered = sorted([*span["reused"], *span["recomputed"]])
        assert covered[0][0] == span["offset"] and covered[-1][1] == span["offset"] + span["length"]
