"""What a request costs the scheduler while the host index holds a million entries.

vLLM's own scheduler with the connector's real scheduler side, in the engine without a model that the tests have: its
workers only keep books. Pictures that hit were shown to it before; the others are none of the million. Each request is
new. Each case is measured twice: one request after the other, and with more memory written between two of them than the
processor's caches hold, so that neither the index nor the code is in them ("cold").

    keys        digests of its pictures' identifiers: under which keys the store may know them
    look-up     which of them are there, and what their entries say of their tokens
    plan        policy, planner and the comparison of costs
    chain       block hashes of reused tokens, so that vLLM's prefix cache keeps them apart

`request` is all of `on_new_request` and `get_num_new_matched_tokens`, measured in other requests, without the clocks
inside.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.engine import VariantError
from bench.results import ROOT, say
from bench.systems.laps import Laps
from bench.systems.records import Budget
from checkpoints import cached_checkpoint

NUM_ENTRIES, QUICK_NUM_ENTRIES = 1_000_000, 100_000
NUM_REQUESTS, QUICK_NUM_REQUESTS = 300, 50  # of each case
COUNTS = (1, 4)  # pictures of a request
NUM_TOKENS = 1664  # of a picture
NUM_KNOWN = 64  # pictures
BLOCK_SIZE = 16  # vLLM's own on a GPU
MAX_TOKENS = 8192
FLUSHED_NBYTES = 64 << 20
KEYS, LOOKUP, PLAN, CHAIN, REQUEST = "keys", "look-up", "plan", "chain", "request"
PARTS = (KEYS, LOOKUP, PLAN, CHAIN)
HIT, MISS = "hit", "miss"


@dataclass(frozen=True, slots=True)
class Case:
    kind: str  # HIT or MISS
    num_pictures: int
    is_cold: bool

    def __str__(self) -> str:
        return f"{self.num_pictures} pictures, {self.kind}" + (", cold" if self.is_cold else "")


def measure(is_quick: bool, budget: Budget) -> dict[str, Any]:
    """{"num_entries", "num_tokens", "cases": [{"case", "is_cold", "us": {part: [...]}}]}: microseconds of each
    request. It takes half a minute, whatever the budget.
    """
    sizes = (QUICK_NUM_ENTRIES, QUICK_NUM_REQUESTS) if is_quick else (NUM_ENTRIES, NUM_REQUESTS)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(_measure, *sizes).result()


# -- in a process of its own ------------------------------------------------------------------------------------------


def _measure(num_entries: int, num_requests: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench_systems-") as runtime:
        os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLCACHE_RUNTIME_DIR": runtime}
        engine = _engine()
        asking = Asking(engine)
        say(f"look-ups: an index of {num_entries} entries")
        _fill(engine.session.index, num_entries)
        cases = [Case(kind, count, is_cold) for is_cold in (False, True) for kind in (HIT, MISS) for count in COUNTS]
        times: dict[Case, dict[str, list[float]]] = {
            case: {REQUEST: asking.whole(case, num_requests)} for case in cases
        }
        asking.watch()
        for case in cases:
            times[case] |= asking.parts(case, num_requests)
            say(f"  {case}: {_told(times[case])}")
    rows = [{"case": str(case), "is_cold": case.is_cold, "us": us} for case, us in times.items()]
    return {"num_entries": len(engine.session.index), "num_tokens": NUM_TOKENS, "cases": rows}


def _told(times: dict[str, list[float]]) -> str:
    return ", ".join(f"{part} {statistics.median(us):.0f}" for part, us in times.items()) + " us"


def _engine() -> Any:
    # The tests' folder `engine` is no package with a file of its own: a module of that name would win, wherever it is.
    sys.path[:] = [path for path in sys.path if not (Path(path) / "engine.py").exists()]
    from vllm.engine.arg_utils import EngineArgs

    from engine.fake_config import Size
    from engine.fake_engine import FakeEngine

    folder = cached_checkpoint("qwen3_vl", 256, 4, root=ROOT / ".checkpoints")
    config = EngineArgs(str(folder), max_model_len=MAX_TOKENS, enforce_eager=True).create_engine_config()
    size = Size(
        num_blocks=2 * MAX_TOKENS // BLOCK_SIZE,
        max_batched_tokens=MAX_TOKENS,
        encoder_tokens=MAX_TOKENS,
        host_nbytes=1 << 30,
    )
    with patch("engine.fake_config.BLOCK_SIZE", BLOCK_SIZE), patch("engine.fake_engine.BLOCK_SIZE", BLOCK_SIZE):
        return FakeEngine(config, size)


def _fill(index: Any, num_entries: int) -> None:
    from vlcache_connector.plan.keys import entry_class

    classes = [entry_class(kind, "image", None) for kind in ("kv", "embedding")]
    for number in range(num_entries - len(index)):
        entry = index.reserve(os.urandom(32), 256, NUM_TOKENS, classes[number % 2])
        index.commit(entry)


class Asking:
    """New requests, of which the scheduler side is asked what it is asked before vLLM admits one."""

    def __init__(self, engine: Any) -> None:
        from engine.fake_prompts import Ask, Image, text

        self._engine, self._side = engine, engine.scheduler.connector._scheduler
        self._dice = np.random.default_rng(0)
        self._flushed = np.zeros(FLUSHED_NBYTES, dtype=np.uint8)
        self._number = 0
        self._laps = Laps()
        for number in range(NUM_KNOWN):
            engine.ask(Ask([*text(number, 20), Image(f"known {number}", NUM_TOKENS), *text(-number, 20)]))
        for kind in ("compute", "recompute", "load"):  # costs are compared once they are known
            for _ in range(8):
                engine.session.prices.add(kind, 1000, {"compute": 0.1, "recompute": 0.2, "load": 0.001}[kind])

    def watch(self) -> None:
        """From now on the parts are timed."""
        from vlcache_connector.engine import kv_scheduler, requests

        session, chains, wrap = self._engine.session, self._side._chains, self._laps.wrap
        wrap(requests, "_find_spans", KEYS)
        wrap(session.fetches, "wait_for_spans", LOOKUP)
        wrap(self._side, "_is_available", LOOKUP)
        wrap(session, "orders", LOOKUP)
        wrap(kv_scheduler, "plan_reuse", PLAN)
        wrap(kv_scheduler, "estimate", PLAN)
        for name in ("resume", "enter", "leave_unused"):
            wrap(chains, name, CHAIN)

    def whole(self, case: Case, num_requests: int) -> list[float]:
        """Microseconds of each request."""
        return [self._ask(case, request) for request in self._requests(case, num_requests)]

    def parts(self, case: Case, num_requests: int) -> dict[str, list[float]]:
        """Microseconds of the parts of each request."""
        times: dict[str, list[float]] = {part: [] for part in PARTS}
        for request in self._requests(case, num_requests):
            self._laps.seconds.clear()
            self._ask(case, request)
            for part, us in times.items():
                us.append(1e6 * self._laps.seconds.get(part, 0.0))
        return times

    def _ask(self, case: Case, request: Any) -> float:
        if case.is_cold:
            self._flushed += 1
        start = time.perf_counter()
        self._side.on_new_request(request)
        num_covered = self._side.get_num_new_matched_tokens(request, 0)
        seconds = time.perf_counter() - start
        self._side.request_finished(request)
        if (num_covered > 0) != (case.kind == HIT):
            raise VariantError(f"{case}: {num_covered} tokens were covered")
        return 1e6 * seconds

    def _requests(self, case: Case, num_requests: int) -> list[Any]:
        """All made before the first is asked: that takes longer than asking."""
        return [self._request(case) for _ in range(num_requests)]

    def _request(self, case: Case) -> Any:
        from engine.fake_prompts import Ask, Image, request_of, text
        from engine.fake_records import IMAGE_TOKEN, Truth

        self._number += 1
        known = self._dice.choice(NUM_KNOWN, case.num_pictures, replace=False)
        parts: list[Any] = text(self._number, 20)
        for number in known:
            name = f"{'known' if case.kind == HIT else self._number} {number}"
            parts += [Image(name, NUM_TOKENS), *text(name, 10)]
        tokens: list[int] = []
        for part in parts:
            tokens += [IMAGE_TOKEN] * part.num_tokens if isinstance(part, Image) else [part]
        truth = Truth(f"asked-{self._number}", tuple(tokens), (), (), len(tokens), None, None, {})
        return request_of(Ask(parts, ratio=0.02, policy="shifted"), truth, self._engine._hasher)
