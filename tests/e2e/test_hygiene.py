"""Approximate KV stays where it was agreed to: never in an exact request, never in an entry."""

from e2e import inside
from e2e.engine import Ask, Engine, Picture
from e2e.test_reuse import CLOSE, LONG, OPEN, A, B, bound, plain, show_pictures  # noqa: F401

PROMPT = [OPEN, LONG, A, "what is it?", LONG, CLOSE]


def test_an_exact_request_is_never_served_approximate_blocks(fresh: Engine, bound: float) -> None:  # noqa: F811
    show_pictures(fresh)
    expected = plain(fresh, PROMPT)
    fresh.forget()
    reuse = fresh.ask_one(Ask(PROMPT, ratio=0.05))
    assert reuse.report["approximate"] and reuse.gap(expected) > bound
    num_leading = fresh.ask_one(Ask(PROMPT[:2], "off")).num_prompt_tokens  # tokens before the picture
    for mode in ("off", "exact"):
        fresh.forget()
        fresh.ask_one(Ask(PROMPT, ratio=0.05))
        assert fresh.call(inside.cached_hashes, Ask(PROMPT, mode)) <= (num_leading + 1) // 32
        answer = fresh.ask_one(Ask(PROMPT, mode))
        assert not answer.report["approximate"] and answer.num_cached_tokens <= num_leading + 1
        assert answer.gap(expected) <= bound


def test_a_repeated_reuse_request_and_its_next_turn_hit_their_own_blocks(fresh: Engine) -> None:
    show_pictures(fresh)
    first = fresh.ask_one(Ask(PROMPT, ratio=0.05))
    again = fresh.ask_one(Ask(PROMPT, ratio=0.05))
    assert again.report["prefix_cached_tokens"] > first.report["reused_tokens"]
    assert again.report["approximate"]
    turn = fresh.ask_one(Ask([*PROMPT, "yes.<|im_end|>\n<|im_start|>user\nand now?", CLOSE], ratio=0.05))
    assert turn.report["prefix_cached_tokens"] >= again.report["prefix_cached_tokens"]


def test_another_ratio_or_tenant_has_its_own_namespace(fresh: Engine) -> None:
    show_pictures(fresh)
    first = fresh.ask_one(Ask(PROMPT, ratio=0.05))
    leading = first.num_prompt_tokens - first.report["computed_tokens"] - first.report["reused_tokens"]
    other = fresh.ask_one(Ask(PROMPT, ratio=0.1))
    assert other.report["prefix_cached_tokens"] <= leading
    stranger = fresh.ask_one(Ask(PROMPT, ratio=0.05, salt="somebody"))
    assert stranger.num_cached_tokens == 0, "neither blocks nor entries of another tenant"
    stranger = fresh.ask_one(Ask([OPEN, A, CLOSE], ratio=0.05, salt="somebody"))
    assert stranger.report["reused_tokens"] > 0, "but its own"


def test_another_tenant_gets_neither_kv_nor_encoder_output_of_a_known_picture(fresh: Engine, bound: float) -> None:  # noqa: F811
    """vLLM's own cache of encoder outputs knows no tenants, so it is emptied before each question."""
    show_pictures(fresh)
    expected = plain(fresh, PROMPT)
    for mode, salt, num_encoded in (("exact", None, 0), ("exact", "one", 1), ("reuse", "two", 1), ("reuse", None, 0)):
        fresh.forget()
        fresh.call(inside.count_encoder_runs)
        answer = fresh.ask_one(Ask(PROMPT, mode, 0.05, salt=salt))
        assert fresh.call(inside.count_encoder_runs) == num_encoded, (mode, salt)
        assert (answer.report["reused_tokens"] > 0) == (mode == "reuse" and salt is None), (mode, salt)
        assert answer.report["reused_tokens"] > 0 or answer.gap(expected) <= bound, (mode, salt)
    fresh.forget()
    assert fresh.ask_one(Ask([OPEN, A, CLOSE], ratio=0.05, salt="one")).report["reused_tokens"] > 0, "but its own"


def test_exact_blocks_that_reach_further_are_preferred(fresh: Engine) -> None:
    show_pictures(fresh)
    expected = plain(fresh, PROMPT)
    fresh.ask_one(Ask(PROMPT, ratio=0.05))
    answer = fresh.ask_one(Ask(PROMPT, ratio=0.05))
    assert not answer.report["approximate"] and answer.report["reused_tokens"] == 0
    assert answer.gap(expected) < 1e-3


def test_a_picture_behind_a_reused_one_is_learnt_when_the_engine_is_idle(fresh: Engine, bound: float) -> None:  # noqa: F811
    """Its embedding is stored at once. Its KV is computed exactly later, under the text that opened the
    conversation.
    """
    show_pictures(fresh)
    before = fresh.call(inside.num_kv_entries)
    new = Picture(21)
    opening = [OPEN, "please look "]
    fresh.ask_one(Ask([*opening, A, "and", new, "same?", CLOSE], ratio=0.05))
    assert fresh.call(inside.num_kv_entries) == before, "approximate KV must not become an entry"
    assert fresh.call(inside.count_encoder_runs) == 4

    fresh.forget()
    fresh.ask_one(Ask([OPEN, new, CLOSE]))  # no KV yet, but no encoder either
    assert fresh.call(inside.count_encoder_runs) == 0


def test_a_picture_that_the_engine_had_encoded_for_a_request_in_mode_off_is_learnt_as_well(fresh: Engine) -> None:
    """Its encoder output is in the engine's own cache, so the encoder connector is never asked about it."""
    show_pictures(fresh)
    before = fresh.call(inside.num_kv_entries)
    new = Picture(23)
    fresh.ask_one(Ask([OPEN, new, CLOSE], "off"))
    fresh.call(inside.counters)
    fresh.call(inside.count_encoder_runs)
    assert fresh.ask_one(Ask([OPEN, LONG, A, "and", new, "same?", CLOSE], ratio=0.05)).report["reused_tokens"] > 0
    assert fresh.call(inside.count_encoder_runs) == 0
    fresh.call(inside.run_idle)
    assert fresh.call(inside.num_kv_entries) == before + 1
    assert "dropped_saves:not_compiled" not in fresh.call(inside.counters)


def test_an_idle_engine_computes_the_entry_exactly(fresh: Engine, bound: float) -> None:  # noqa: F811
    show_pictures(fresh)
    before = fresh.call(inside.num_kv_entries)
    new = Picture(22)
    opening = [OPEN, "please look "]
    fresh.ask_one(Ask([*opening, A, "and", new, "same?", CLOSE], ratio=0.05))
    assert fresh.call(inside.run_idle) >= 1
    assert fresh.call(inside.num_kv_entries) == before + 1
    # Where the picture stands behind the same opening, its entry is exact KV: even reusing all of it equals plain vLLM.
    prompt = [*opening, new, "what?", CLOSE]
    expected = plain(fresh, prompt)
    fresh.forget()
    answer = fresh.ask_one(Ask(prompt, ratio=0.0))
    assert answer.report["reused_tokens"] > 0
    assert answer.gap(expected) <= bound


def test_a_chat_that_starts_with_a_known_picture_reuses_the_later_ones_next_time(fresh: Engine) -> None:
    show_pictures(fresh)
    new = Picture(23)
    fresh.ask_one(Ask([OPEN, A, "and", new, "same?", CLOSE]))
    fresh.call(inside.run_idle)
    fresh.forget()
    answer = fresh.ask_one(Ask([OPEN, LONG, new, B, "same?", CLOSE]))
    assert answer.report["reused_tokens"] > 0 and "reason" not in answer.report
