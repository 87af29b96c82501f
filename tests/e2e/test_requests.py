"""What one request can ask for, and what is declined with its reason."""

from typing import Any

import pytest

from e2e import inside
from e2e.engine import Answer, Ask, Engine, Picture, answer_of, request_of
from e2e.test_reuse import CLOSE, LONG, OPEN, A, bound, plain, show_pictures  # noqa: F401

PROMPT = [OPEN, LONG, A, "what is it?", CLOSE]


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (Ask(PROMPT, "off"), "mode"),
        (Ask(PROMPT, "exact"), "mode"),
        (Ask(PROMPT, sampling={"prompt_logprobs": 1}), "prompt_logprobs"),
        (Ask(PROMPT, params={"mode": "fast"}), "invalid_options"),
        (Ask(PROMPT, params={"mode": "reuse", "ratio": 0.1}), "invalid_options"),
        (Ask(PROMPT, params={"recompute_ratio": 1.5}), "invalid_options"),
        (Ask(PROMPT, params={"recompute_ratio": True}), "invalid_options"),
    ],
)
def test_a_request_that_is_declined_runs_as_plain_vllm(
    fresh: Engine,
    bound: float,  # noqa: F811
    ask: Ask,
    reason: str,
) -> None:
    show_pictures(fresh)
    expected = plain(fresh, PROMPT)
    fresh.forget()
    fresh.call(inside.counters)
    answer = fresh.ask_one(ask)
    assert answer.report["reason"] == reason and answer.report["reused_tokens"] == 0
    assert answer.gap(expected) <= bound
    assert fresh.call(inside.counters)[f"declines:{reason}"] == 1


def test_an_invalid_option_is_named_in_the_response(fresh: Engine) -> None:
    answer = fresh.ask_one(Ask(PROMPT, params={"recompute_ration": 0.1}))
    assert answer.report["mode"] == "off"
    assert "recompute_ration" in answer.report["error"] and "recompute_ratio" in answer.report["error"]


def test_mode_off_neither_reads_nor_writes_the_store(fresh: Engine) -> None:
    fresh.ask_one(Ask(PROMPT, "off"))
    assert fresh.call(inside.entry_sizes) == []
    show_pictures(fresh)
    fresh.call(inside.count_encoder_runs)
    fresh.ask_one(Ask(PROMPT, "off"))
    assert fresh.call(inside.count_encoder_runs) == 1


def test_mode_exact_skips_the_encoder_but_no_prefill(fresh: Engine) -> None:
    show_pictures(fresh)
    fresh.call(inside.count_encoder_runs)
    answer = fresh.ask_one(Ask(PROMPT, "exact"))
    assert fresh.call(inside.count_encoder_runs) == 0
    assert answer.report["computed_tokens"] == answer.num_prompt_tokens


def test_identifiers_that_a_client_chose_are_not_trusted(fresh: Engine) -> None:
    """Two different pictures under one UUID: the second must not be served the first one's KV."""
    for picture in (Picture(41), Picture(42)):
        report = fresh.call(_ask_with_uuid, picture, "my-picture")
        assert report["reason"] == "client_uuid" and report["reused_tokens"] == 0
        fresh.forget()
    assert fresh.call(inside.entry_sizes) == []


def _ask_with_uuid(llm: Any, picture: Picture, uuid: str) -> dict[str, Any]:
    llm.llm_engine.reset_mm_cache()  # vLLM itself takes one UUID for one picture while it remembers it
    prompt, sampling = request_of(Ask([OPEN, picture, CLOSE]))
    (output,) = llm.generate(prompt | {"multi_modal_uuids": {"image": [uuid]}}, sampling, use_tqdm=False)
    return answer_of(output).report


def test_one_uuid_that_looks_like_a_hash_never_serves_a_picture_of_another_size(fresh: Engine) -> None:
    """Such a UUID cannot be told from a hash; the second picture must at least not read beyond the first one's
    entry.
    """
    uuid = "ab" * 32
    assert fresh.call(_ask_with_uuid, Picture(44), uuid)["reason"] == "miss"
    fresh.forget()
    fresh.call(inside.count_encoder_runs)
    report = fresh.call(_ask_with_uuid, Picture(45, 560, 560), uuid)
    assert report["reason"] == "miss" and report["reused_tokens"] == 0
    assert fresh.call(inside.count_encoder_runs) == 1
    assert "failures:load_embedding" not in fresh.call(inside.counters), "the short entry was not even announced"


def test_same_size_pictures_are_never_confused(fresh: Engine, bound: float) -> None:  # noqa: F811
    """Their placeholder tokens are identical; only their content differs."""
    show_pictures(fresh)
    other = [OPEN, LONG, Picture(43), "what is it?", CLOSE]
    expected = plain(fresh, other)
    fresh.forget()
    answer = fresh.ask_one(Ask(other))
    assert answer.report["reason"] == "miss" and answer.gap(expected) <= bound


def test_one_picture_under_another_processor_setting_is_another_picture(fresh: Engine, bound: float) -> None:  # noqa: F811
    """The same bytes and as many placeholder tokens, but other pixels reach the encoder: it is resized otherwise."""
    odd = Picture(46, 270, 290)
    coarse = {"mm_processor_kwargs": {"resample": 0}}
    prompt = [OPEN, LONG, odd, "what is it?", CLOSE]
    fresh.ask_one(Ask([OPEN, odd, CLOSE]))
    fresh.forget()
    expected = fresh.call(_ask_with, Ask(prompt, "off"), coarse)
    fresh.forget()
    answer = fresh.call(_ask_with, Ask(prompt), coarse)
    assert answer.report["reason"] == "miss" and answer.gap(expected) <= bound
    usual = plain(fresh, prompt)
    assert usual.num_prompt_tokens == answer.num_prompt_tokens and answer.gap(usual) > bound, "not the same to see"
    assert fresh.call(inside.num_kv_entries) == 2
    for more in ({}, coarse):
        fresh.forget()
        assert fresh.call(_ask_with, Ask([OPEN, "once more ", odd, CLOSE]), more).report["reused_tokens"] > 0


def _ask_with(llm: Any, ask: Ask, more: dict[str, Any]) -> Answer:
    """`more`: further fields of vLLM's prompt."""
    prompt, sampling = request_of(ask)
    (output,) = llm.generate(prompt | more, sampling, use_tqdm=False)
    return answer_of(output)
