"""Tensor parallelism over two worker processes: each holds its heads of every entry, and all must agree."""

import pytest

from e2e import inside
from e2e.conftest import Start
from e2e.engine import Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, RESOLUTION, SCENES, A, B, noise_of, show_pictures

PROMPT = [OPEN, LONG, B, A, "what is it?", CLOSE]
PIECES = "vlcache_connector.engine.piece_loader"
SPANS, SHIFT = "vlcache_connector.exec.spans", "vlcache_connector.exec.shift"


@pytest.fixture(scope="module")
def pair(start_here: Start) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one core for each worker
        connector = {"host_gib": 0.03, "audit_fraction": 1.0}
        engine = start_here("pair", "qwen2_5_vl", "float32", connector, tensor_parallel_size=2)
    engine.call(inside.watch_counters)
    return engine


@pytest.fixture
def fresh_pair(pair: Engine) -> Engine:
    pair.call(inside.repair_all_ranks)
    pair.forget()
    pair.call(inside.reset_store)
    return pair


def test_both_ranks_reuse_and_full_recompute_equals_plain(fresh_pair: Engine) -> None:
    limit = 2 * noise_of(fresh_pair) + RESOLUTION
    show_pictures(fresh_pair)
    for name, parts in SCENES.items():
        fresh_pair.forget()
        expected = fresh_pair.ask_one(Ask(parts, "off"))
        fresh_pair.forget()
        full = fresh_pair.ask_one(Ask(parts, ratio=1.0))
        assert full.report["recomputed_tokens"] > 0 and full.gap(expected) <= limit, name
        fresh_pair.forget()
        assert fresh_pair.ask_one(Ask(parts, ratio=0.05)).report["reused_tokens"] > 0, name
    fresh_pair.call(inside.check_store)


@pytest.mark.parametrize("policy", ["deviation", "scored"])
def test_ranks_agree_on_the_tokens_that_a_measure_chooses(fresh_pair: Engine, policy: str) -> None:
    """Each sees its own heads. If they chose for themselves, their passes would add up rows of different tokens."""
    show_pictures(fresh_pair)
    fresh_pair.forget()
    fresh_pair.call(inside.watch_narrowed)
    assert fresh_pair.ask_one(Ask(PROMPT, ratio=0.1, policy=policy)).report["reused_tokens"] > 0
    one, other = fresh_pair.call(inside.narrowed)
    assert len(one) == 1 and one == other


@pytest.mark.parametrize("policy", ["deviation", "scored"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_sees_nothing_goes_by_what_the_others_see(fresh_pair: Engine, policy: str, rank: int) -> None:
    limit = 2 * noise_of(fresh_pair) + RESOLUTION
    show_pictures(fresh_pair)
    fresh_pair.forget()
    expected = fresh_pair.ask_one(Ask(PROMPT, "off"))
    fresh_pair.forget()
    fresh_pair.call(inside.plant_on_rank, rank, PIECES, "StoredSpan")
    answer = fresh_pair.ask_one(Ask(PROMPT, ratio=0.05, policy=policy))
    assert answer.report["reason"] == "load_failed" and answer.gap(expected) <= limit
    fresh_pair.forget()
    assert fresh_pair.ask_one(Ask(PROMPT, ratio=0.05, policy=policy)).report["reused_tokens"] > 0
    fresh_pair.call(inside.check_store)


@pytest.mark.parametrize(
    ("module", "fault"),
    [(PIECES, "load_runs"), (PIECES, "position_delta"), (SPANS, "SpanShift"), (SHIFT, "shift_rows")],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_that_fails_on_one_rank_is_computed_on_both(
    fresh_pair: Engine, module: str, fault: str, rank: int
) -> None:
    policy = "leading" if fault == "load_runs" else "shifted"
    limit = 2 * noise_of(fresh_pair) + RESOLUTION
    show_pictures(fresh_pair)
    fresh_pair.forget()
    expected = fresh_pair.ask_one(Ask(PROMPT, "off"))
    fresh_pair.forget()
    fresh_pair.call(inside.plant_on_rank, rank, module, fault)
    answer = fresh_pair.ask_one(Ask(PROMPT, ratio=0.05, policy=policy))
    assert answer.report["reason"] == "load_failed" and answer.gap(expected) <= limit
    fresh_pair.forget()
    again = fresh_pair.ask_one(Ask(PROMPT, ratio=0.05, policy=policy))
    assert again.report["reused_tokens"] > 0, "the next one reuses again"
    fresh_pair.call(inside.check_store)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_entry_that_one_rank_could_not_save_is_found_by_nobody(fresh_pair: Engine, rank: int) -> None:
    fresh_pair.call(inside.plant_on_rank, rank, "vlcache_connector.engine.kv_worker", "save_run")
    prompt = [OPEN, A, "what is it?", CLOSE]
    fresh_pair.ask_one(Ask(prompt))
    fresh_pair.forget()
    assert fresh_pair.ask_one(Ask([OPEN, LONG, A, CLOSE], ratio=0.05)).report["reason"] == "miss"
    fresh_pair.forget()
    assert fresh_pair.ask_one(Ask([OPEN, LONG, LONG, A, CLOSE], ratio=0.05)).report["reused_tokens"] > 0


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_both_ranks_take_part_in_an_audit_and_one_that_fails_ends_it(fresh_pair: Engine, rank: int | None) -> None:
    show_pictures(fresh_pair)
    fresh_pair.forget()
    free = fresh_pair.call(inside.num_free_blocks)
    assert fresh_pair.ask_one(Ask(PROMPT)).report["reused_tokens"] > 0
    fresh_pair.call(inside.counters)
    if rank is not None:
        fresh_pair.call(inside.plant_on_rank, rank, PIECES, "position_delta")
    fresh_pair.call(inside.run_idle)
    counts = fresh_pair.call(inside.counters)
    if rank is None:
        assert counts["audits"] == 1 and 0 < counts["drift_kl"][0] < 1
        assert 0 < counts["drift_kv:1"] < 1
    else:
        assert counts["dropped_audits:failed"] == 1 and "audits" not in counts
    assert fresh_pair.call(inside.num_free_blocks) == free
    fresh_pair.call(inside.check_store)
    fresh_pair.forget()
    assert fresh_pair.ask_one(Ask(PROMPT)).report["reused_tokens"] > 0
