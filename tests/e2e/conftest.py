"""Engines that the end-to-end tests share: each is started once, when the first test asks for it."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Family, cached_checkpoint
from e2e import inside
from e2e.engine import Engine

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    TOKENIZERS_PARALLELISM="false",
)

Start = Callable[..., Engine]


@pytest.fixture(scope="session", autouse=True)
def _runtime() -> Iterator[None]:
    """Control sockets of engines lie in a folder of this session, with a short path."""
    with tempfile.TemporaryDirectory() as where, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLCACHE_RUNTIME_DIR", f"{where}/sockets")
        yield


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts an engine and closes it when the session ends."""
    yield from _starting(tmp_path_factory)


@pytest.fixture(scope="module")
def start_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts an engine and closes it when the tests of this file are over: an engine takes 1 to 2 GB."""
    yield from _starting(tmp_path_factory)


@pytest.fixture
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts an engine and closes it when the test is over."""
    yield from _starting(tmp_path_factory)


def _starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    engines: list[Engine] = []

    def start(name: str, family: Family, dtype: str, connector: dict[str, Any] | None, **options: Any) -> Engine:
        checkpoint = cached_checkpoint(family, 256, 4, root=Path(".checkpoints"), dtype=dtype)
        log = tmp_path_factory.mktemp(name) / "engine.log"
        engine = Engine(checkpoint, log, connector, dtype=dtype, **options)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    return chosen


@pytest.fixture(scope="session")
def exact_engine(start_engine: Start, family: Family) -> Engine:
    """float32, so that agreement is tight; a host tier of 32 MB, so that a few dozen pictures overflow it."""
    return watched(start_engine(f"float32-{family}", family, "float32", {"host_gib": 0.03}))


@pytest.fixture(scope="session")
def engine(start_engine: Start, family: Family) -> Engine:
    """bfloat16, as it is served; prefill in chunks that are smaller than an image, long ones in even smaller chunks."""
    limits = {"max_num_batched_tokens": 96, "long_prefill_token_threshold": 32}
    return watched(start_engine(f"bfloat16-{family}", family, "bfloat16", {}, **limits))


@pytest.fixture
def fresh(exact_engine: Engine) -> Iterator[Engine]:
    """The float32 engine with empty caches; afterwards nothing is pinned or under way."""
    yield from emptied(exact_engine)


@pytest.fixture
def fresh_bf16(engine: Engine) -> Iterator[Engine]:
    """The bfloat16 engine with empty caches; afterwards nothing is pinned or under way."""
    yield from emptied(engine)


def watched(engine: Engine) -> Engine:
    engine.call(inside.watch_counters)
    return engine


def emptied(engine: Engine) -> Iterator[Engine]:
    engine.forget()
    engine.call(inside.reset_store)
    engine.call(inside.count_encoder_runs)
    engine.call(inside.counters)
    yield engine
    engine.call(inside.repair)
    engine.call(inside.run_idle)
    engine.call(inside.check_store)
