"""Engines that share a remote store: Redis where it is installed, else lmcache's file system adapter."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e import inside
from e2e.conftest import Start
from e2e.engine import Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, RESOLUTION, A, B, noise_of, show_pictures
from redis_server import RedisServer, running
from store.remote_tiers import needs_lmcache

pytestmark = needs_lmcache
PROMPT = [OPEN, LONG, B, A, "what is it?", CLOSE]


class Store:
    """A store, and its values as tests see them."""

    def __init__(self, folder: Path, server: RedisServer | None) -> None:
        self._folder, self._server = folder, server
        self.option: dict[str, Any] = {"type": "fs_native", "base_path": str(folder)}
        if server is not None:
            self.option = {"type": "resp", "host": "127.0.0.1", "port": server.port}
        self.option |= {"num_workers": 2, "timeout_s": 20}

    def flip_a_bit_of_each_value(self) -> None:
        if self._server is None:
            for path in self._folder.rglob("*.data"):
                path.write_bytes(_flipped(path.read_bytes()))
            return
        for name in self._server.blobs():
            self._server.ask("SET", name, _flipped(self._server.ask("GET", name)))


def _flipped(value: bytes) -> bytes:
    content = bytearray(value)
    content[len(content) // 2] ^= 1
    return bytes(content)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("store")
    if shutil.which("redis-server") is None:
        yield Store(folder, None)
    else:
        with running(folder) as server:
            yield Store(folder, server)


@pytest.fixture(scope="module")
def first(start_here: Start, store: Store) -> Engine:
    """It has seen the pictures and written all there is to write."""
    engine = start_here("first", "qwen2_5_vl", "float32", {"host_gib": 0.03, "remote": store.option})
    show_pictures(engine)
    assert engine.call(inside.drain)
    return engine


@pytest.fixture(scope="module")
def second(first: Engine, start_here: Start, store: Store) -> Engine:
    engine = start_here("second", "qwen2_5_vl", "float32", {"host_gib": 0.03, "remote": store.option})
    engine.call(inside.watch_counters)
    engine.call(inside.be_patient)
    engine.call(inside.count_encoder_runs)
    return engine


def test_the_first_request_of_another_engine_reuses_what_the_first_computed(first: Engine, second: Engine) -> None:
    found = second.ask_one(Ask(PROMPT, ratio=0.05))
    assert found.report["tier"] == "remote" and found.report["reused_tokens"] > 0
    assert second.call(inside.count_encoder_runs) == 0
    known = first.ask_one(Ask(PROMPT, ratio=0.05))
    assert known.report["tier"] == "host" and found.token_ids == known.token_ids
    assert found.gap(known) <= RESOLUTION, "the bytes are the same"
    counts = second.call(inside.counters)
    assert counts["read_entries:remote"] == counts["asked_entries:remote_hit"] == 4
    assert "lost_entries:remote" not in counts
    second.call(inside.check_store)


def test_full_recompute_from_the_store_equals_plain(second: Engine) -> None:
    limit = 2 * noise_of(second) + RESOLUTION
    second.forget()
    expected = second.ask_one(Ask(PROMPT, "off"))
    second.forget()
    second.call(inside.forget_host_tier)
    full = second.ask_one(Ask(PROMPT, ratio=1.0))
    assert full.report["tier"] == "remote" and full.report["recomputed_tokens"] > 0 and full.gap(expected) <= limit


def test_damaged_values_are_computed_again(second: Engine, store: Store) -> None:
    limit = 2 * noise_of(second) + RESOLUTION
    second.forget()
    expected = second.ask_one(Ask(PROMPT, "off"))
    assert second.call(inside.drain)
    second.forget()
    second.call(inside.forget_host_tier)
    second.call(inside.counters)
    store.flip_a_bit_of_each_value()
    answer = second.ask_one(Ask(PROMPT, ratio=0.05))
    assert answer.report["reused_tokens"] == 0 and answer.gap(expected) <= limit
    assert second.call(inside.counters)["lost_entries:remote"] > 0
    assert second.call(inside.drain)
    second.forget()
    second.call(inside.forget_host_tier)
    again = second.ask_one(Ask([OPEN, A, "once more", CLOSE], ratio=0.05))
    assert again.report["tier"] == "remote" and again.report["reused_tokens"] > 0, "it was written again"


def test_the_ranks_of_a_tensor_parallel_engine_find_their_own_parts(start_here: Start, store: Store) -> None:
    options = {"host_gib": 0.03, "remote": store.option}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one core for each worker
        pair = start_here("pair", "qwen2_5_vl", "float32", options, tensor_parallel_size=2)
    pair.call(inside.be_patient)
    show_pictures(pair)
    known = pair.ask_one(Ask(PROMPT, ratio=0.05))
    assert pair.call(inside.drain)
    pair.forget()
    pair.call(inside.forget_host_tier)
    found = pair.ask_one(Ask(PROMPT, ratio=0.05))
    assert found.report["tier"] == "remote" and found.gap(known) <= RESOLUTION
    pair.call(inside.check_store)
