"""Entries outlive the engine that made them: on disk, for the next engine or for one beside it."""

from pathlib import Path

import pytest

from e2e import inside
from e2e.conftest import Start
from e2e.engine import Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, RESOLUTION, A, B, noise_of, show_pictures

PROMPT = [OPEN, LONG, B, A, "what is it?", CLOSE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def first(start_here: Start, folder: Path) -> Engine:
    """It has seen the pictures and written all there is to write."""
    engine = start_here("first", "qwen2_5_vl", "float32", {"host_gib": 0.03, "disk_path": str(folder)})
    show_pictures(engine)
    assert engine.call(inside.drain)
    return engine


@pytest.fixture(scope="module")
def second(first: Engine, start_here: Start, folder: Path) -> Engine:
    engine = start_here("second", "qwen2_5_vl", "float32", {"host_gib": 0.03, "disk_path": str(folder)})
    engine.call(inside.watch_counters)
    engine.call(inside.be_patient)
    engine.call(inside.count_encoder_runs)
    return engine


def test_the_next_engine_reuses_from_its_first_request_on(first: Engine, second: Engine) -> None:
    found = second.ask_one(Ask(PROMPT, ratio=0.05))
    assert found.report["tier"] == "disk" and found.report["reused_tokens"] > 0
    assert second.call(inside.count_encoder_runs) == 0
    known = first.ask_one(Ask(PROMPT, ratio=0.05))
    assert known.report["tier"] == "host" and found.token_ids == known.token_ids
    assert found.gap(known) <= RESOLUTION, "the bytes are the same"
    counts = second.call(inside.counters)
    assert counts["read_entries:disk"] == 4 and "lost_entries:disk" not in counts
    second.call(inside.check_store)


def test_full_recompute_from_disk_equals_plain(second: Engine) -> None:
    limit = 2 * noise_of(second) + RESOLUTION
    second.forget()
    expected = second.ask_one(Ask(PROMPT, "off"))
    second.forget()
    second.call(inside.forget_host_tier)
    full = second.ask_one(Ask(PROMPT, ratio=1.0))
    assert full.report["recomputed_tokens"] > 0 and full.gap(expected) <= limit


def test_damaged_files_are_computed_again(second: Engine, folder: Path) -> None:
    limit = 2 * noise_of(second) + RESOLUTION
    second.forget()
    expected = second.ask_one(Ask(PROMPT, "off"))
    second.forget()
    second.call(inside.forget_host_tier)
    second.call(inside.counters)
    for path in folder.rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    answer = second.ask_one(Ask(PROMPT, ratio=0.05))
    assert answer.report["reused_tokens"] == 0 and answer.gap(expected) <= limit
    assert second.call(inside.counters)["lost_entries:disk"] > 0
    for number in ("first", "second"):  # a file that nobody had to read yet is found to be damaged by the first
        assert second.call(inside.drain)
        second.forget()
        second.call(inside.forget_host_tier)
        again = second.ask_one(Ask([OPEN, A, number, CLOSE], ratio=0.05))
        if again.report["reused_tokens"] > 0:
            break
    assert again.report["tier"] == "disk" and again.report["reused_tokens"] > 0, f"not written again: {again.report}"


def test_the_ranks_of_a_tensor_parallel_engine_find_their_own_parts(start_here: Start, tmp_path: Path) -> None:
    options = {"host_gib": 0.03, "disk_path": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one core for each worker
        pair = start_here("pair", "qwen2_5_vl", "float32", options, tensor_parallel_size=2)
    pair.call(inside.be_patient)
    limit = 2 * noise_of(pair) + RESOLUTION
    show_pictures(pair)
    pair.forget()
    known = pair.ask_one(Ask(PROMPT, ratio=0.05))
    pair.forget()
    expected = pair.ask_one(Ask(PROMPT, "off"))
    assert pair.call(inside.drain)
    pair.forget()
    pair.call(inside.forget_host_tier)
    found = pair.ask_one(Ask(PROMPT, ratio=0.05))
    assert found.report["tier"] == "disk" and found.gap(known) <= RESOLUTION
    pair.forget()
    pair.call(inside.forget_host_tier)
    assert pair.ask_one(Ask(PROMPT, ratio=1.0)).gap(expected) <= limit
    pair.call(inside.check_store)
