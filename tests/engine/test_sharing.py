"""How images are reused, and what requests share: with vLLM's own scheduler, synchronous and asynchronous, on one rank
and on two.

Each engine is looked at when its test is over: no block, pin, job or request may be left (see `conftest`), and in every
step all that is read must have been written for just that (see `fake_worker`).
"""

import pytest

from engine.conftest import MakeEngine
from engine.fake_config import BLOCK_SIZE
from engine.fake_prompts import Ask, Image, text
from engine.scenes import BETWEEN, CLOSE, OPEN, PROMPT, A, B, C, reused, show

# -- the ordinary course ----------------------------------------------------------------------------------------------


def test_images_are_reused_at_other_places_and_in_another_order(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine)
    (answer,) = engine.ask(Ask(PROMPT, ratio=0.0))
    assert reused(answer) == A.num_tokens + B.num_tokens
    assert answer.report["recomputed_tokens"] == len(OPEN) + len(BETWEEN)
    assert engine.encoded == [A.identifier, B.identifier, C.identifier], "each was encoded once, when it was new"


def test_a_prompt_that_ends_with_an_image_leaves_the_last_token_to_the_engine(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine)
    (answer,) = engine.ask(Ask([*OPEN, A, B], ratio=0.0))
    assert reused(answer) == A.num_tokens + B.num_tokens - 1 and answer.report["computed_tokens"] == 1


def test_one_image_twice_in_a_prompt_is_reused_twice(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine)
    (answer,) = engine.ask(Ask([*OPEN, A, A, *BETWEEN, A, *CLOSE], ratio=0.0))
    assert reused(answer) == 3 * A.num_tokens


def test_the_next_turn_goes_on_behind_the_blocks_of_the_last_one(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine)
    first = Ask(PROMPT, max_tokens=9)
    (answer,) = engine.ask(first)
    turn = [*PROMPT, *answer.token_ids, *text("next", 5), C, *CLOSE]
    (answer,) = engine.ask(Ask(turn))
    assert answer.report["prefix_cached_tokens"] >= 12 * BLOCK_SIZE and 0 < reused(answer) < C.num_tokens
    (answer,) = engine.ask(Ask(turn, mode="exact"))
    assert answer.report["prefix_cached_tokens"] <= len(OPEN), "nothing approximate"


def test_a_new_image_behind_the_approximate_blocks_of_the_last_turn_is_not_saved_from_there(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    show(engine, A, B)
    first = Ask(PROMPT, max_tokens=9)
    (answer,) = engine.ask(first)
    (answer,) = engine.ask(Ask([*PROMPT, *answer.token_ids, C, *CLOSE]))
    assert answer.report["prefix_cached_tokens"] > len(OPEN) and answer.report["approximate"]
    engine.forget()
    assert reused(*engine.ask(Ask([*BETWEEN, C, *CLOSE], ratio=0.0))) == C.num_tokens, "but learnt, when it was idle"


def test_an_image_behind_reuse_is_learnt_when_the_engine_is_idle(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine, A)
    engine.ask(Ask([*OPEN, A, *BETWEEN, C, *CLOSE]))
    engine.forget()
    (answer,) = engine.ask(Ask([*text("other", 9), C, *CLOSE], ratio=0.0))
    assert reused(answer) == C.num_tokens


@pytest.mark.parametrize("budget", [1, 5, 16])
def test_tiny_steps_carry_out_a_plan_in_many_pieces(make_engine: MakeEngine, budget: int) -> None:
    """The engine itself looks at the cost of each step's pieces."""
    engine = make_engine(max_batched_tokens=budget)
    show(engine)
    decoding = engine.add(Ask(OPEN, max_tokens=60))
    for _ in range(2 * len(OPEN)):
        engine.step()
    for ratio in (0.0, 0.3, 1.0):
        (answer,) = engine.ask(Ask([*text(ratio, 7), *PROMPT], ratio=ratio))
        assert answer.report["recomputed_tokens"] + reused(answer) == 7 + len(OPEN) + 33 + len(BETWEEN)
    assert engine.answers[decoding].is_finished


# -- sharing ----------------------------------------------------------------------------------------------------------


def test_requests_with_the_same_prefix_that_arrive_together_get_their_own_answers(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batched_tokens=16)
    show(engine)
    endings: list[list[int | Image]] = [[*CLOSE], [*text(1, 9)], [C, *CLOSE], [A, *text(2, 3)]]
    kinds = [("reuse", 0.05), ("reuse", 1.0), ("exact", 0.05), ("off", 0.05), ("reuse", 0.5)]
    asks = [Ask([*PROMPT, *end], mode, ratio, max_tokens=6) for end in endings for mode, ratio in kinds]
    answers = engine.ask(*asks)
    for ask, answer in zip(asks, answers, strict=True):
        is_reuse = ask.mode == "reuse" and ask.ratio != 1.0
        assert (reused(answer) > 0) == is_reuse or answer.report["prefix_cached_tokens"] > 0


def test_tenants_share_neither_entries_nor_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine, salt="one")
    answers = engine.ask(*(Ask(PROMPT, salt=salt) for salt in ("two", None, "one")))
    assert [reused(answer) > 0 for answer in answers] == [False, False, True]
    answers = engine.ask(*(Ask(PROMPT, salt=salt) for salt in ("one", "two")))
    assert all(answer.report["prefix_cached_tokens"] > len(OPEN) for answer in answers), "each has blocks of its own"


def test_only_requests_of_one_setting_share_approximate_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine)
    for mode, ratio in [("reuse", 0.05), ("reuse", 0.5), ("exact", 0.05), ("off", 0.05), ("reuse", 1.0)]:
        (first,) = engine.ask(Ask(PROMPT, mode, ratio))
        assert first.report["prefix_cached_tokens"] <= len(OPEN) or mode == "off" or ratio == 1.0
        (again,) = engine.ask(Ask(PROMPT, mode, ratio))
        assert again.report["prefix_cached_tokens"] >= len(OPEN) + B.num_tokens


def test_each_policy_has_approximate_blocks_of_its_own(make_engine: MakeEngine) -> None:
    """What one policy left in the prefix cache is not found under another, and found again under the same."""
    engine = make_engine()
    show(engine)
    asks = [Ask(PROMPT, ratio=0.5, policy=policy) for policy in ("leading", "shifted", "leading", "shifted")]
    answers = [engine.ask(ask)[0] for ask in asks]
    assert [reused(answer) > 0 for answer in answers[:2]] == [True, True]
    cached = [answer.report["prefix_cached_tokens"] for answer in answers]
    assert cached[1] < len(OPEN) + B.num_tokens, "nothing approximate is shared"
    assert min(cached[2:]) > len(OPEN) + B.num_tokens and all(reused(answer) < B.num_tokens for answer in answers[2:])
