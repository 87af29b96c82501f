"""Functions that run in the engine's process: they look at the connector's state, or plant a fault in it."""

from collections.abc import Callable
from typing import Any

import torch
from e2e.engine import Ask, request_of
from vllm.distributed.kv_transfer import get_kv_transfer_group

from vlcache_connector.engine.kv_worker import VLCacheWorker
from vlcache_connector.engine.session import SCHEDULERS

_undo: list[Callable[[], None]] = []


def core(llm: Any) -> Any:
    """vLLM's engine core, when it runs in this process."""
    return llm.llm_engine.engine_core.engine_core


def session(llm: Any) -> Any:
    return SCHEDULERS._sessions[llm.llm_engine.vllm_config.instance_id][0]


def worker(llm: Any) -> VLCacheWorker:
    return get_kv_transfer_group()._worker  # type: ignore[union-attr]


def model(llm: Any) -> Any:
    return worker(llm)._stack._model  # type: ignore[attr-defined]


def num_entries(llm: Any) -> int:
    return len(session(llm).index)


def reset_store(llm: Any) -> None:
    core(llm).scheduler.connector.reset_cache()


def check_store(llm: Any) -> None:
    """The index agrees with itself, and nothing is pinned or under way between requests."""
    state = session(llm)
    state.index.check()
    assert not state._jobs, f"jobs were never answered: {state._jobs}"
    assert all(entry.pins == 0 for entry in state.index._entries.values()), "a pin leaked"


def counters(llm: Any) -> dict[str, float]:
    """Counts of both sides since the last call."""
    stats = core(llm).scheduler.connector.get_kv_connector_stats()
    total: dict[str, float] = dict(_seen(llm))
    _seen(llm).clear()
    for key, value in (stats.data if stats else {}).items():
        total[key] = total.get(key, 0) + value
    return total


_seen_counts: dict[str, float] = {}


def _seen(llm: Any) -> dict[str, float]:
    return _seen_counts


def watch_counters(llm: Any) -> None:
    """Keep what the engine takes from the counters at every step, for `counters`."""
    connector_class = type(core(llm).scheduler.connector)
    take = connector_class.get_kv_connector_stats

    def taking(connector: Any) -> Any:
        stats = take(connector)
        for key, value in (stats.data if stats else {}).items():
            _seen_counts[key] = _seen_counts.get(key, 0) + value
        return stats

    connector_class.get_kv_connector_stats = taking


def count_encoder_runs(llm: Any) -> int:
    """How many images the vision encoder has processed since the last call. The first call starts counting."""
    visual = model(llm).visual
    if not hasattr(visual, "_images_seen"):
        visual._images_seen = 0
        forward = visual.forward

        def counting(x: torch.Tensor, grid_thw: Any, *args: Any, **kwargs: Any) -> Any:
            visual._images_seen += len(grid_thw)
            return forward(x, grid_thw, *args, **kwargs)

        visual.forward = counting
    seen, visual._images_seen = visual._images_seen, 0
    return int(seen)


def run_idle(llm: Any) -> int:
    """Step the idle engine as its busy loop does, until it has nothing left to do; returns the number of steps."""
    steps = 0
    while core(llm).scheduler.has_requests():
        core(llm).step_fn()
        steps += 1
        assert steps < 100, "the engine never gets idle"
    return steps


def plant(llm: Any, owner: str, name: str, times: int = 1) -> None:
    """Make `owner.name` (a dotted path to a class or module, and a function in it) raise the next `times` times."""
    module_name, _, attribute = owner.partition(":")
    target = __import__(module_name, fromlist=["x"])
    if attribute:
        target = getattr(target, attribute)
    original = getattr(target, name)
    left = times

    def raising(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left > 0:
            left -= 1
            raise RuntimeError(f"planted in {name}")
        return original(*args, **kwargs)

    setattr(target, name, raising)
    _undo.append(lambda: setattr(target, name, original))


def repair(llm: Any) -> None:
    """Take all planted faults back."""
    while _undo:
        _undo.pop()()


def compute_prefix(llm: Any, ask: Ask, num_tokens: int) -> int:
    """Bring the whole blocks of a prompt's first tokens, and no others, into vLLM's prefix cache; returns their tokens."""
    prompt, sampling = request_of(ask)
    llm.llm_engine.add_request("prefix", prompt, sampling)
    scheduler = core(llm).scheduler
    blocks: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        (request_id,) = scheduler.requests
        llm.llm_engine.step()
        if request_id in scheduler.requests:
            blocks = list(scheduler.kv_cache_manager.get_block_ids(request_id)[0])
    keep = num_tokens // scheduler.block_size
    assert keep < len(blocks), "the prompt is too short, or its request ended in its first step"
    scheduler.kv_cache_manager.block_pool.evict_blocks(set(blocks[keep:]))
    return int(keep * scheduler.block_size)
