"""Engines without a model, made from one configuration of vLLM's own."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import cached_checkpoint
from engine.fake_config import Size
from engine.fake_engine import FakeEngine

MakeEngine = Callable[..., FakeEngine]
KINDS = [  # asynchronous scheduling, ranks, copies that end late
    (is_async, num_ranks, is_async != (num_ranks == 2))
    for is_async, num_ranks in itertools.product((False, True), (1, 2))
]


@pytest.fixture(scope="session")
def base_config() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    folder = cached_checkpoint("qwen3_vl", 256, 4, root=Path(".checkpoints"))
    return EngineArgs(str(folder), max_model_len=2048, enforce_eager=True).create_engine_config()


@pytest.fixture(params=KINDS, ids=[f"{'async' if a else 'sync'}-{r}" for a, r, _ in KINDS])
def make_engine(request: Any, base_config: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEngine]:
    """`make_engine(num_blocks=20, ...)`, see `Size`; other names are options of the connector. Whatever a test does,
    its engines must come to rest afterwards with nothing left over.
    """
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    is_async, num_ranks, is_late = request.param
    engines: list[FakeEngine] = []

    def make(**settings: Any) -> FakeEngine:
        sizes = {name: settings.pop(name) for name in list(settings) if name in Size.__dataclass_fields__}
        engines.append(
            FakeEngine(
                base_config,
                Size(**{"is_async": is_async, "num_ranks": num_ranks, "is_late": is_late} | sizes),
                **settings,
            )
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()
