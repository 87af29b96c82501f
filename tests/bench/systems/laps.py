"""Where an answer spends its time. Runs in the engine's process, which must be that of the engine core and the worker.

The functions that vLLM calls, and the connector's own stopwatches, are timed without what they call that is timed as
well; so parts never overlap, and what is missing to the whole is between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.engine import Measured
from bench.systems.engines import Prompt, ask, forget

LOOKUP = "look-up and plan"
SCHEDULING = "scheduling"
LOADING_STEP = "step without a forward"
LOAD = "load"
RECOMPUTE = "recompute"
CONNECTOR = "connector, rest"
FORWARD = "engine's forward"
SAMPLING = "sampling"
OUTPUT = "output"
BETWEEN = "between"
PARTS = (LOOKUP, SCHEDULING, LOADING_STEP, LOAD, RECOMPUTE, CONNECTOR, FORWARD, SAMPLING, OUTPUT, BETWEEN)
ENGINE_PRODUCTS, TORCH_PRODUCTS = "vLLM's products", "PyTorch's products"  # of matrices
ATTENTION, SHIFT, OTHER_OPS, PYTHON = "attention", "loads and shifts", "other ops", "Python"
PASS_PARTS = (ENGINE_PRODUCTS, TORCH_PRODUCTS, ATTENTION, SHIFT, OTHER_OPS, PYTHON)


class Laps:
    """Seconds by part, each without the parts inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, float, float]] = []  # part, start, seconds of what was inside

    def enter(self, part: str) -> None:
        self._open.append((part, time.perf_counter(), 0.0))

    def leave(self) -> None:
        part, start, inside_s = self._open.pop()
        whole_s = time.perf_counter() - start
        self.seconds[part] = self.seconds.get(part, 0.0) + whole_s - inside_s
        if self._open:
            outer, outer_start, outer_inside_s = self._open[-1]
            self._open[-1] = (outer, outer_start, outer_inside_s + whole_s)

    def wrap(self, owner: Any, name: str, part: str | Callable[..., str]) -> None:
        """Time `owner.name`; `part` may depend on the arguments."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part if isinstance(part, str) else part(*args))
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, timed)


_laps = Laps()
_pass_parts: dict[str, float] | None = None  # of the pass that is being profiled


def install(llm: Any) -> None:
    """Once for each engine, before the first question."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from e2e import inside

    core = inside.core(llm)
    scheduler_side = core.scheduler.connector
    for name in ("on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta"):
        _laps.wrap(scheduler_side, name, LOOKUP)
    _laps.wrap(core.scheduler, "schedule", SCHEDULING)
    _laps.wrap(core.scheduler, "update_from_output", OUTPUT)
    _laps.wrap(core.model_executor, "execute_model", _kind_of_step)
    _laps.wrap(core.model_executor, "sample_tokens", SAMPLING)
    _laps.wrap(get_kv_transfer_group(), "wait_for_save", CONNECTOR)
    _watch(inside.worker(llm)._watches)


def _kind_of_step(output: Any, *_: Any) -> str:
    return FORWARD if output.total_num_scheduled_tokens else LOADING_STEP


def _watch(watches: Mapping[str, Any]) -> None:
    """The connector's stopwatches show where its loads and passes begin and end."""
    from vlcache_connector.exec.stopwatch import Stopwatch

    parts = {watches["load"]: LOAD, watches["recompute"]: RECOMPUTE}
    profiler: Any = None
    start, stop = Stopwatch.start, Stopwatch.stop

    def starting(watch: Stopwatch) -> None:
        nonlocal profiler
        start(watch)
        if (part := parts.get(watch)) is not None:
            _laps.enter(part)
            if part == RECOMPUTE and _pass_parts is not None:
                profiler = _new_profiler()
                profiler.start()

    def stopping(watch: Stopwatch, num_tokens: int) -> None:
        nonlocal profiler
        stop(watch, num_tokens)
        if watch in parts:
            _laps.leave()
            if profiler is not None:
                profiler.stop()
                _add_ops(profiler)
                profiler = None

    Stopwatch.start, Stopwatch.stop = starting, stopping  # type: ignore[method-assign]


def _new_profiler() -> Any:
    import torch

    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def _add_ops(profiler: Any) -> None:
    assert _pass_parts is not None
    for event in profiler.key_averages():
        part = _kind_of_op(event.key)
        _pass_parts[part] = _pass_parts.get(part, 0.0) + event.self_cpu_time_total / 1e6


def _kind_of_op(name: str) -> str:
    if "attention" in name:
        return ATTENTION
    if name.startswith("vlcache::"):
        return SHIFT
    if not any(word in name for word in ("mm", "matmul", "linear", "einsum")):
        return OTHER_OPS
    return TORCH_PRODUCTS if name.startswith("aten::") else ENGINE_PRODUCTS


def timed(llm: Any, prompt: Prompt, vlcache: Mapping[str, Any]) -> tuple[Measured, dict[str, float]]:
    """An answer, and the seconds of its parts."""
    _laps.seconds.clear()
    measured = ask(llm, prompt, vlcache)
    seconds = {part: _laps.seconds.get(part, 0.0) for part in PARTS}
    seconds[BETWEEN] = measured.engine_s - sum(seconds.values())
    return measured, seconds


def pass_shares(llm: Any, prompt: Prompt, vlcache: Mapping[str, Any]) -> dict[str, float]:
    """Shares of the recompute pass by kind of operation, from a profiled run, which is slower than others."""
    global _pass_parts
    forget(llm)
    _pass_parts = {}
    _, seconds = timed(llm, prompt, vlcache)
    found, _pass_parts = _pass_parts, None
    found[PYTHON] = max(seconds[RECOMPUTE] - sum(found.values()), 0.0)
    return {part: found.get(part, 0.0) / sum(found.values()) for part in PASS_PARTS}
