"""Faults inside the connector, planted in the running engine: each ends as ordinary computation, and the engine
lives on.
"""

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from e2e import inside
from e2e.engine import Ask, Engine, Picture
from e2e.test_reuse import CLOSE, LONG, OPEN, A, B, bound, bound_bf16, plain, show_pictures  # noqa: F401
from vlcache_connector.engine import debug

PROMPT: Sequence[str | Picture] = [OPEN, LONG, B, A, "what is it?", CLOSE]
SIDES = "vlcache_connector.engine."

REUSE_FAULTS = {
    "new request": (SIDES + "kv_scheduler", "describe"),
    "look-up": (SIDES + "kv_scheduler:VLCacheScheduler", "_plan"),
    "namespace": (SIDES + "chains:Chains", "enter"),
    "planning the job": (SIDES + "loads:LoadQueue", "add"),
    "positions": (SIDES + "models.qwen_vl:QwenVLStack", "positions"),
    "position delta": (SIDES + "piece_loader", "position_delta"),
    "load": (SIDES + "piece_loader", "load_runs"),
    "load on the way": ("vlcache_connector.exec.shift", "shift_rows"),
    "recompute": ("vlcache_connector.exec.recompute:Recompute", "run"),
    "a layer of the pass": (SIDES + "pass_impl:PassImpl", "forward"),
}
SAVE_FAULTS = {
    "planning the save": (SIDES + "saves:SavePlanner", "_save"),
    "save": (SIDES + "kv_worker", "save_run"),
    "saving the embedding": (SIDES + "ec_sides", "save_embedding"),
}


@pytest.mark.parametrize("fault", REUSE_FAULTS)
def test_a_fault_on_the_way_to_reuse_ends_as_plain_computation(fresh: Engine, bound: float, fault: str) -> None:  # noqa: F811
    show_pictures(fresh)
    expected = plain(fresh, PROMPT)
    fresh.forget()
    fresh.call(inside.counters)
    fresh.call(inside.plant, *REUSE_FAULTS[fault])
    policy = "leading" if fault == "load" else "shifted"
    answer = fresh.ask_one(Ask(PROMPT, ratio=0.05, policy=policy))
    assert answer.gap(expected) <= bound
    assert answer.report.get("reused_tokens", 0) == 0
    counts = fresh.call(inside.counters)
    assert sum(count for name, count in counts.items() if name.startswith("failures")) >= 1

    fresh.call(inside.repair)
    again = fresh.ask_one(Ask(PROMPT, "exact"))
    assert again.gap(expected) <= bound, "nothing half-written is found in the prefix cache"
    fresh.forget()
    assert fresh.ask_one(Ask(PROMPT, ratio=0.05)).report["reused_tokens"] > 0, "the next request reuses again"


def test_one_failing_request_does_not_disturb_others_of_its_step(fresh: Engine, bound: float) -> None:  # noqa: F811
    show_pictures(fresh)
    asks = [Ask([OPEN, word, A, "what?", CLOSE], ratio=1.0) for word in ("one ", "another ", "third ")]
    expected = [plain(fresh, ask.parts) for ask in asks]
    fresh.forget()
    fresh.call(inside.plant, SIDES + "piece_loader", "position_delta")
    answers = fresh.ask(*asks)
    assert [answer.report.get("reason") == "load_failed" for answer in answers].count(True) == 1
    assert all(answer.gap(other) <= bound for answer, other in zip(answers, expected, strict=True))


@pytest.mark.parametrize("arrival", [0, 1, 2])
def test_nobody_reads_the_half_written_blocks_of_a_failed_request(
    fresh_bf16: Engine,
    bound_bf16: float,  # noqa: F811
    arrival: int,
) -> None:
    """The failed request is computed in chunks over many steps; meanwhile a plain one with the same beginning
    arrives.
    """
    show_pictures(fresh_bf16)
    failing = Ask([OPEN, LONG, LONG, A, "what is it?", CLOSE], ratio=0.05, max_tokens=2)
    other = Ask([OPEN, LONG, LONG, "only text", CLOSE], "off", max_tokens=2)
    expected = [plain(fresh_bf16, ask.parts) for ask in (failing, other)]
    fresh_bf16.forget()
    fresh_bf16.call(inside.plant, "vlcache_connector.exec.recompute:Recompute", "run")
    answers = fresh_bf16.call(inside.drive, [(0, failing), (arrival, other)])
    assert answers[0].report["reason"] == "load_failed"
    assert all(answer.gap(one) <= bound_bf16 for answer, one in zip(answers, expected, strict=True))


def test_a_log_at_debug_level_names_what_was_launched_before_it_failed(fresh: Engine) -> None:
    show_pictures(fresh)
    fresh.call(inside.plant, *REUSE_FAULTS["recompute"])
    fresh.call(_listen)
    try:
        answer = fresh.ask_one(Ask(PROMPT, ratio=0.05))
    finally:
        launched, finished, *others = fresh.call(_heard)
    assert not others
    assert "launching reuse" in launched and "recompute 0-" in launched and "the last piece" in launched
    assert "load=failed(recompute pass: planted in run) pieces=1" in finished and "reason=load_failed" in finished
    assert f"prompt={answer.num_prompt_tokens} " in finished and f"computed={answer.num_prompt_tokens} " in finished


_lines: list[str] = []


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _lines.append(record.getMessage())


def _listen(llm: Any) -> None:
    debug.logger.addHandler(_Handler())
    debug.logger.setLevel(logging.DEBUG)


def _heard(llm: Any) -> list[str]:
    """What was heard so far; nothing is from now on."""
    debug.logger.handlers.clear()
    debug.logger.setLevel(logging.NOTSET)
    return _lines


@pytest.mark.parametrize("fault", SAVE_FAULTS)
def test_a_fault_while_saving_is_only_a_future_miss(fresh: Engine, bound: float, fault: str) -> None:  # noqa: F811
    expected = plain(fresh, PROMPT)
    fresh.forget()
    fresh.call(inside.counters)
    fresh.call(inside.plant, *SAVE_FAULTS[fault], 2)
    answer = fresh.ask_one(Ask(PROMPT))
    assert answer.gap(expected) <= bound
    assert fresh.call(inside.counters)["failures:save"] >= 1
    fresh.call(inside.repair)
    fresh.forget()
    assert fresh.ask_one(Ask(PROMPT)).gap(expected) <= bound


def test_what_was_computed_over_a_failed_reuse_is_not_saved(fresh: Engine, bound: float) -> None:  # noqa: F811
    """A new picture behind a range that should have been recomputed in full, which makes the plan exact."""
    show_pictures(fresh)
    before = fresh.call(inside.num_kv_entries)
    new = Picture(51)
    prompt = [OPEN, LONG, A, "and", new, "same?", CLOSE]
    expected = plain(fresh, prompt)
    fresh.forget()
    fresh.call(inside.plant, "vlcache_connector.exec.recompute:Recompute", "run")
    assert fresh.ask_one(Ask(prompt, ratio=1.0)).gap(expected) <= bound
    assert fresh.call(inside.num_kv_entries) == before


def test_an_embedding_that_cannot_be_loaded_is_encoded_again(fresh: Engine, bound: float) -> None:  # noqa: F811
    show_pictures(fresh)
    expected = plain(fresh, PROMPT)
    fresh.forget()
    fresh.call(inside.count_encoder_runs)
    fresh.call(inside.plant, SIDES + "ec_sides:ECWorker", "_load")
    answer = fresh.ask_one(Ask(PROMPT, "exact"))
    assert answer.gap(expected) <= bound
    assert fresh.call(inside.count_encoder_runs) == 1, "one of two embeddings was lost"


def test_a_fault_in_idle_work_is_only_a_future_miss(fresh: Engine) -> None:
    show_pictures(fresh)
    before = fresh.call(inside.num_kv_entries)
    fresh.ask_one(Ask([OPEN, A, "and", Picture(31), "same?", CLOSE], ratio=0.05))
    fresh.call(inside.plant, SIDES + "kv_worker:VLCacheWorker", "_compile")
    fresh.call(inside.run_idle)
    assert fresh.call(inside.num_kv_entries) == before


def test_entries_are_evicted_when_the_tier_is_full_and_never_corrupted(fresh: Engine, bound: float) -> None:  # noqa: F811
    """More pictures than fit: old ones are gone, recent ones are reused, and full recompute still agrees with plain
    vLLM.
    """
    pictures = [Picture(100 + number, 560, 560) for number in range(40)]
    for picture in pictures:
        fresh.ask_one(Ask([OPEN, "first seen here ", picture, CLOSE]))
    assert fresh.call(inside.counters)["evictions:room"] > 0
    recent, oldest = [OPEN, LONG, pictures[-1], CLOSE], [OPEN, LONG, pictures[0], CLOSE]
    expected = plain(fresh, recent)
    fresh.forget()
    answer = fresh.ask_one(Ask(recent, ratio=1.0))
    assert answer.report["recomputed_tokens"] > 0 and answer.gap(expected) <= bound
    assert fresh.ask_one(Ask(oldest, ratio=1.0)).report["reason"] == "miss"
