"""Entries that leave, pools that are full, pauses and engines that end: with vLLM's own scheduler, synchronous and
asynchronous, on one rank and on two.

Each engine is looked at when its test is over: no block, pin, job or request may be left (see `conftest`), and in every
step all that is read must have been written for just that (see `fake_worker`).
"""

from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState

from engine.conftest import MakeEngine
from engine.fake_config import Size
from engine.fake_engine import FakeEngine
from engine.fake_prompts import Ask, Image, text
from engine.scenes import BETWEEN, CLOSE, OPEN, PROMPT, A, B, C, drop_entries, reused, show, steps_of
from vlcache_connector.engine.session import SCHEDULERS

# -- entries that leave -----------------------------------------------------------------------------------------------


def test_entries_that_are_evicted_while_a_request_waits_are_a_miss(make_engine: MakeEngine) -> None:
    """It was asked for, and its plan made, in every step in which the pool was full."""
    engine = make_engine(num_blocks=26)
    show(engine)
    holding = engine.add(Ask(text("long", 60), max_tokens=20))
    for _ in range(3):
        engine.step()
    waiting = engine.add(Ask(PROMPT, max_tokens=3))
    for _ in range(3):
        engine.step()
    assert engine.status(waiting) == "WAITING" and engine.status(holding) == "RUNNING"
    assert engine.scheduler.connector._scheduler._states[waiting].plan.num_reused > 0, "it was asked for"
    drop_entries(engine)
    engine.run()
    assert engine.answers[waiting].is_finished and reused(engine.answers[waiting]) == 0


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_an_image_of_which_one_half_was_evicted_is_a_miss(make_engine: MakeEngine, kind: str) -> None:
    engine = make_engine()
    show(engine)
    drop_entries(engine, kind)
    (answer,) = engine.ask(Ask(PROMPT))
    assert answer.report["reason"] == "miss"


def test_images_within_a_prefix_hit_are_not_saved_again(make_engine: MakeEngine) -> None:
    """Their encoder outputs are gone, and their KV may be approximate."""
    engine = make_engine(encoder_tokens=A.num_tokens)
    engine.ask(Ask([*PROMPT, C, *CLOSE], "exact"))
    drop_entries(engine)
    (answer,) = engine.ask(Ask([*PROMPT, C, *text("other", 5)], "exact"))
    assert answer.report["prefix_cached_tokens"] > len(OPEN) + B.num_tokens + A.num_tokens
    (answer,) = engine.ask(Ask([*CLOSE, A, B, *CLOSE]))
    assert answer.report["reason"] == "miss"


def test_entries_of_an_admitted_request_stay_until_it_is_loaded(make_engine: MakeEngine) -> None:
    """New images need all the room there is; the workers look at what they load."""
    nbytes = 2048
    engine = make_engine(max_batched_tokens=8, host_nbytes=60 * nbytes)
    show(engine, A, B)
    name = engine.add(Ask(PROMPT, ratio=1.0))
    new = [engine.add(Ask([*text(number, 3), Image(f"new {number}", 11), *CLOSE])) for number in range(8)]
    engine.run()
    assert engine.answers[name].report["recomputed_tokens"] > 0
    assert all(engine.answers[other].is_finished for other in new)
    assert engine.session.index.evictions > 0


def test_entries_stay_while_copies_that_a_load_began_go_on(make_engine: MakeEngine) -> None:
    """The load counts as done before they are: what reads the pages comes behind them, but whoever writes to the memory
    of entries does not.
    """
    engine = make_engine(is_late=True)
    show(engine)
    name = engine.add(Ask(PROMPT, max_tokens=9))
    state = engine.scheduler.connector._scheduler._states[name]
    for _ in range(9):
        if not state.is_loaded:
            engine.step()
    assert state.is_loaded
    drop_entries(engine, "kv")
    left = [entry for entry in engine.session.index._entries.values() if entry.entry_class.kind == "kv"]
    assert {entry.num_tokens for entry in left} == {A.num_tokens, B.num_tokens}
    engine.run()
    assert reused(engine.answers[name]) > 0
    drop_entries(engine, "kv")
    assert not any(entry.entry_class.kind == "kv" for entry in engine.session.index._entries.values())


def test_a_reset_while_requests_wait_load_and_save_leaves_nothing_to_be_found(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batched_tokens=8)
    ask = Ask([*PROMPT, Image("new", 10), *CLOSE], ratio=0.5)
    show(engine)
    for stage in range(steps_of(engine, ask)):
        show(engine)
        name = engine.add(ask)
        for _ in range(stage):
            engine.step()
        assert engine.scheduler.reset_connector_cache()
        assert not any(engine.session.index.get(key) for key in engine.session.index._entries)
        engine.run()
        assert engine.answers[name].is_finished
        engine.check_idle()
        engine.forget()
        assert reused(*engine.ask(ask)) == 0
        engine.scheduler.reset_connector_cache()
        engine.forget()


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_nothing_of_the_old_weights_is_read_with_the_new_ones(make_engine: MakeEngine, mode: str) -> None:
    """Records know the weights that made them. The images are new each time: vLLM keeps no pixels of others."""
    engine = make_engine(max_batched_tokens=16)
    for stage in range(12):
        new = [Image(f"{stage} {number}", 12) for number in range(2)]
        engine.add(Ask([*OPEN, new[0], *BETWEEN, new[1], *CLOSE], max_tokens=9))
        engine.add(Ask([*OPEN, new[1], *CLOSE], "exact", max_tokens=9))
        for _ in range(stage):
            engine.step()
        engine.change_weights(mode)
        engine.run()
        engine.check_idle()
        engine.ask(Ask([*text(stage, 5), *reversed(new), *CLOSE]))


@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_an_engine_that_loads_can_be_paused_and_its_caches_cleared(make_engine: MakeEngine, mode: str) -> None:
    engine = make_engine(max_batched_tokens=8)
    show(engine)
    ask = Ask(PROMPT, ratio=1.0)
    for stage in range(steps_of(engine, ask)):
        show(engine)
        name, queued = engine.add(ask), engine.add(Ask([*PROMPT, C, *CLOSE], ratio=0.05))
        for _ in range(stage):
            engine.step()
        engine.change_weights(mode)
        engine.run()
        engine.check_idle()
        assert mode == "abort" or (engine.answers[name].is_finished and engine.answers[queued].is_finished)


@pytest.mark.xfail(
    raises=RuntimeError, strict=True, reason="vLLM 0.32 cannot start requests again whose load is under way"
)
def test_an_engine_that_loads_can_be_paused_with_its_requests_kept(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batched_tokens=8)
    show(engine)
    engine.add(Ask(PROMPT, ratio=1.0))
    for _ in range(3):
        engine.step()
    engine.change_weights("keep")


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_an_engine_that_slept_with_its_caches_goes_on_where_it_was(make_engine: MakeEngine, mode: str) -> None:
    """Sleep of level 0: scheduling stops, nothing is cleared, and requests that come meanwhile wait."""
    engine = make_engine(max_batched_tokens=8)
    show(engine)
    ask = Ask(PROMPT, ratio=0.5, max_tokens=4)
    for stage in range(steps_of(engine, ask)):
        before = engine.add(ask)
        for _ in range(stage):
            engine.step()
        engine.pause(mode)
        meanwhile = engine.add(Ask([*PROMPT, C, *CLOSE], ratio=0.05))
        engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        engine.run()
        assert engine.answers[meanwhile].is_finished and reused(engine.answers[meanwhile]) > 0
        assert mode == "abort" or engine.answers[before].is_finished
        engine.check_idle()
        engine.forget()


# -- little room ------------------------------------------------------------------------------------------------------


def test_a_pool_that_is_almost_full_makes_loads_wait_and_all_of_them_end(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=30, max_batched_tokens=16)
    show(engine)
    names = [engine.add(Ask([*text(n, 3), *PROMPT], ratio=(0.0, 1.0)[n % 2], max_tokens=12)) for n in range(12)]
    engine.run()
    assert all(engine.answers[name].is_finished for name in names)
    assert engine.counts["hits"] >= len(names)


def test_a_request_that_is_asked_for_many_times_is_loaded_once(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=30)
    show(engine)
    engine.add(Ask(text("long", 70), max_tokens=30))
    for _ in range(3):
        engine.step()
    waiting = engine.add(Ask(PROMPT, ratio=0.0, max_tokens=30))
    connector = engine.scheduler.connector
    asked, ask_connector = [], connector.get_num_new_matched_tokens

    def watching(request: Any, num_local: int) -> Any:
        asked.append(request.request_id)
        return ask_connector(request, num_local)

    connector.get_num_new_matched_tokens = watching
    engine.run()
    assert asked.count(waiting) > 5
    assert engine.counts["hits"] == 1 and engine.counts["reused_tokens"] == reused(engine.answers[waiting]) == 33


def test_blocks_that_are_freed_while_their_save_is_under_way_hold_what_is_saved(make_engine: MakeEngine) -> None:
    """The pool has room for one request: each takes the blocks of the one before, aborted in the step of its save."""
    engine = make_engine(num_blocks=14)
    for stage in range(6):
        images = [Image(f"{stage} {number}", 20) for number in range(3)]
        names = [engine.add(Ask([*text(number, 8), image, *CLOSE])) for number, image in enumerate(images)]
        for _ in range(stage):
            engine.step()
        engine.abort(names[0])
        engine.run()
        engine.forget()
        for image in images:
            engine.ask(Ask([*CLOSE, image, *CLOSE]))
            engine.forget()


# -- engines ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_starts_anew_knows_nothing_of_the_one_before(make_engine: MakeEngine) -> None:
    first = make_engine()
    show(first)
    second = make_engine()
    assert second.session is not first.session
    assert second.ask(Ask(PROMPT))[0].report["reason"] == "miss"
    assert reused(*first.ask(Ask(PROMPT))) > 0


def test_an_engine_that_shuts_down_in_the_middle_of_a_load_keeps_no_session(
    base_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    engine = FakeEngine(base_config, Size(max_batched_tokens=8))
    show(engine)
    engine.add(Ask(PROMPT, ratio=1.0))
    engine.step()
    engine.scheduler.shutdown()
    assert engine.config.instance_id not in SCHEDULERS._sessions


def test_a_producer_alone_frees_blocks_at_once_and_still_reads_nothing_wrong(make_engine: MakeEngine) -> None:
    """With `kv_producer` vLLM does not hold back the blocks that a step under way still writes."""
    engine = make_engine(role="kv_producer", num_blocks=24, max_batched_tokens=16)
    show(engine)
    names = [engine.add(Ask([*text(n, 3), *PROMPT], ratio=0.5, max_tokens=1 + n % 4)) for n in range(9)]
    engine.run()
    assert all(engine.answers[name].is_finished for name in names)
