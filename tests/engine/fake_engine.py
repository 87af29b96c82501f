"""An engine without a model: vLLM's own scheduler, KV cache manager and connector factory, and workers that keep books.

It takes milliseconds where a real engine takes seconds, and its workers notice with certainty what a real one shows as
slightly different numbers, if at all: see `fake_worker`. `step` is `EngineCore.step`, or with asynchronous scheduling
`EngineCore.step_with_batch_queue`: the next step is scheduled before the answers of the last one are known, and the
workers run as late as they may.
"""

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from vllm.distributed.ec_transfer.ec_connector.utils import ECOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import RequestStatus

from engine.fake_config import BLOCK_SIZE, Size, configure
from engine.fake_entries import FakeEntries
from engine.fake_prompts import Ask, request_of, truth_of
from engine.fake_records import Truth
from engine.fake_worker import FakeWorker
from vlcache_connector.engine.session import SCHEDULERS, WORKERS, entry_layout
from vlcache_connector.engine.tiers import slab_name
from vlcache_connector.metrics import merge
from vlcache_connector.plan.pieces import LOADED_PER_COMPUTED
from vlcache_connector.store.slab import EntryLayout

init_none_hash(sha256)


@dataclass(slots=True)
class Answer:
    token_ids: list[int] = field(default_factory=list)
    is_finished: bool = False
    report: dict[str, Any] = field(default_factory=dict)


class FakeEngine:
    """`base` is a configuration that vLLM made; it is copied, never changed."""

    def __init__(self, base: Any, size: Size, **options: Any) -> None:
        self.size = size
        self.config = configure(base, size, options)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
        self.truths: dict[str, Truth] = {}
        self.answers: dict[str, Answer] = {}
        self.is_struck: Callable[[str, int, str], bool] = lambda stage, rank, request_id: False
        self.audited: Callable[[Any], float] = lambda job: 0.0
        self.are_copies_done: Callable[[], bool] = lambda: True  # when somebody asks between two steps
        self.num_lost_pieces = 0
        self.is_stopped = False
        cache = KVCacheConfig(size.num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        self.workers = [self._make_worker(rank, entry_layout(self.config, cache)) for rank in range(size.num_ranks)]
        with patch("vllm.v1.core.sched.scheduler.MultiModalBudget", lambda *_: _EncoderBudget(size.encoder_tokens)):
            kind = AsyncScheduler if size.is_async else Scheduler
            self.scheduler: Any = kind(self.config, cache, _NoGrammar(), BLOCK_SIZE)
        assert self.scheduler.connector._reason is None, self.scheduler.connector._reason
        self.steps: list[Any] = []  # scheduler outputs
        self._kv, self._ec = KVOutputAggregator(size.num_ranks), ECOutputAggregator()
        self._queue: deque[tuple[Any, list[int]]] = deque()  # scheduled, not yet answered
        self._executed: deque[Any] = deque()  # answers of the first of them
        self._aborts: list[str] = []
        self._fresh: list[int] = []
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.counts: dict[str, Any] = Counter()  # of the connector, see `metrics`
        self._watch_allocations()
        self._watch_counters()
        self.num_free_at_start = self.num_free_blocks
        self._shares_process = size.is_late and size.num_ranks == 1
        if self._shares_process:  # as vLLM's executor for one rank does
            worker: Any = SimpleNamespace(late=self.workers[0])
            WORKERS.attach(self.config.instance_id, lambda: worker)

    def _make_worker(self, rank: int, layout: EntryLayout) -> FakeWorker:
        entries = FakeEntries.make(rank, layout, self.size.host_nbytes, slab_name(self.config, rank))
        keeps_pixels = self.size.keeps_pixels
        return FakeWorker(
            rank,
            BLOCK_SIZE,
            self.truths,
            self._struck,
            keeps_pixels,
            entries,
            lambda job: self.audited(job),
            lambda: self.are_copies_done(),
            self.size.is_late,
        )

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, ask: Ask) -> str:
        request_id = f"request-{len(self.truths)}"
        truth = self.truths[request_id] = truth_of(request_id, ask)
        self.answers[request_id] = Answer()
        self.scheduler.add_request(request_of(ask, truth, self._hasher))
        return request_id

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def abort_during_step(self, request_id: str) -> None:
        """Abort after the workers ran, before the scheduler sees their answers."""
        self._aborts.append(request_id)

    def ask(self, *asks: Ask) -> list[Answer]:
        """Answers of requests that arrive together."""
        names = [self.add(ask) for ask in asks]
        self.run()
        assert all(self.answers[name].is_finished for name in names)
        return [self.answers[name] for name in names]

    # -- steps --------------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._queue) or self.scheduler.has_requests()

    def run(self, max_steps: int = 2000) -> None:
        """Until there is nothing left to do."""
        for _ in range(max_steps):
            if not self.has_work:
                return
            self.step()
        raise AssertionError(f"after {max_steps} steps there is still work: {list(self.scheduler.requests)}")

    def step(self) -> None:
        if self.scheduler.has_requests():
            self._schedule()
            output = self._queue[-1][0]
            is_going_on = output.total_num_scheduled_tokens > 0 or self.scheduler.has_requests()
            if self._shares_process:
                self._execute(len(self._queue))
            if self.size.is_async and len(self._queue) < 2 and is_going_on:
                return
        if self._queue:
            self._execute(1)
            (output, _), answer = self._queue.popleft(), self._executed.popleft()
            if output.total_num_scheduled_tokens == 0 and self.session.lower is not None:
                time.sleep(0.001)  # as EngineCore does, for the threads
            while self._aborts:
                self.abort(self._aborts.pop())
            self._take(self.scheduler.update_from_output(output, answer))

    def _schedule(self) -> None:
        output = self.scheduler.schedule()
        fresh, self._fresh = self._fresh, []
        self._queue.append((output, fresh))
        self.steps.append(output)
        pieces = [piece for piece in output.kv_connector_metadata.reuse if _cost(piece) > 0]
        budget, scheduled = self.size.max_batched_tokens, output.total_num_scheduled_tokens
        is_within = sum(map(_cost, pieces)) <= max(budget - scheduled, budget // 8, 1) + 1e-6
        is_one_span = len(pieces) == 1 and pieces[0].shifts
        assert is_within or is_one_span, "pieces beyond the budget of the step"

    def _execute(self, num_steps: int) -> None:
        """Let the workers catch up, so that they have run `num_steps` of those that were not answered yet."""
        for output, fresh in itertools.islice(self._queue, len(self._executed), num_steps):
            outputs = [worker.execute(output, fresh) for worker in self.workers]
            self._ec.aggregate(outputs)
            self._executed.append(self._kv.aggregate(outputs))

    def _take(self, outputs: dict[int, Any]) -> None:
        for output in (one for client in outputs.values() for one in client.outputs):
            answer, truth = self.answers[output.request_id], self.truths[output.request_id]
            answer.token_ids += output.new_token_ids
            expected = truth.token_ids[truth.num_prompt : truth.num_prompt + len(answer.token_ids)]
            assert tuple(answer.token_ids) == expected, f"{output.request_id} answers something else"
            if output.finish_reason is not None:
                answer.is_finished = True
                answer.report = (output.kv_transfer_params or {}).get("vlcache", {})

    # -- events -------------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Empty the prefix cache of an idle engine; entries stay."""
        assert self.scheduler.reset_prefix_cache()

    def pause(self, mode: str) -> None:
        """As `EngineCore.pause_scheduler`, until the engine is idle; before a weight update, or to sleep."""
        if mode == "abort":
            self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL if mode == "keep" else PauseState.PAUSED_NEW)
        self.run()

    def change_weights(self, mode: str) -> None:
        """Pause, clear all caches, change the weights, go on. Sleep of level 1 or 2 is the same: pages are gone."""
        try:
            self.pause(mode)
            self.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
            self.scheduler.reset_encoder_cache()
            for worker in self.workers:
                worker.weights += 1
                worker.encoder_cache.clear()
                worker.pages.clear()
        finally:
            self.scheduler.set_pause_state(PauseState.UNPAUSED)

    def preempt(self, request_id: str) -> None:
        """Take a running request's blocks away, as a full pool does."""
        request = self.scheduler.requests[request_id]
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, 0.0, drop_stale_output=self.scheduler.requires_kv_delivery)

    # -- what is to be seen -------------------------------------------------------------------------------------------

    @property
    def session(self) -> Any:
        return SCHEDULERS._sessions[self.config.instance_id][0]

    @property
    def num_free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def encoded(self) -> list[str]:
        """Images that the encoder worked on."""
        return self.workers[0].encoded

    def status(self, request_id: str) -> str:
        return str(self.scheduler.requests[request_id].status.name)

    def check(self) -> None:
        """Hold at any time."""
        self.session.index.check()

    def check_idle(self) -> None:
        """Nothing is left over when all requests are gone."""
        if self.session.lower is not None:
            assert self.session.lower.drain(10), "entries are still on their way"
        self.check()
        side = self.scheduler.connector._scheduler
        assert not self.has_work and not self.scheduler.requests
        assert self.num_free_blocks == self.num_free_at_start, "blocks leaked"
        assert not self.session._jobs, f"jobs were never settled: {self.session._jobs}"
        assert all(entry.pins == 0 for entry in self.session.index._entries.values()), "a pin leaked"
        assert not side._states and not side._loads._loads and side._loads.num_open == 0
        assert not len(side._audits) and not side._audits._open
        assert not self.scheduler.ec_connector._scheduler._loads
        assert not self._kv._recv_remaining_count and not self._kv._failed_recving_pending
        assert all(not worker._errors for worker in self.workers)
        errors = {name for name in self.counts if name.startswith("failures:")} - {"failures:reuse"}
        assert not errors, f"errors inside the connector: {errors}"
        assert self.counts["failures:reuse"] <= self.num_lost_pieces, "a load failed though nothing was planted"

    def stop(self) -> None:
        """Come to rest, with nothing left over, and end."""
        if not self.is_stopped:
            self.is_stopped = True
            self.run()
            self.check_idle()
            self.scheduler.shutdown()
            if self._shares_process:
                WORKERS.detach(self.config.instance_id)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _struck(self, stage: str, rank: int, request_id: str) -> bool:
        is_struck = self.is_struck(stage, rank, request_id)
        self.num_lost_pieces += is_struck and stage == "piece"
        return is_struck

    def _watch_allocations(self) -> None:
        pool = self.scheduler.kv_cache_manager.block_pool
        allocate = pool.get_new_blocks

        def watching(num_blocks: int) -> Any:
            blocks = allocate(num_blocks)
            self._fresh += [block.block_id for block in blocks]
            return blocks

        pool.get_new_blocks = watching

    def _watch_counters(self) -> None:
        counters = self.session.counters
        take = counters.take

        def watching() -> Any:
            values = take()
            merge(self.counts, values)
            return values

        counters.take = watching


@dataclass(slots=True)
class _EncoderBudget:
    """Stands in for `MultiModalBudget`, which would load a processor."""

    num_tokens: int
    mm_max_toks_per_item: dict[str, int] = field(default_factory=dict)

    @property
    def encoder_compute_budget(self) -> int:
        return self.num_tokens

    @property
    def encoder_cache_size(self) -> int:
        return self.num_tokens


class _NoGrammar:
    def accept_tokens(self, request: Any, token_ids: Any) -> bool:
        return True


def _cost(piece: Any) -> float:
    loaded = sum(len(run) for span in piece.spans for run in span.reused)
    return float(sum(len(run) for run in piece.recomputed) + loaded / LOADED_PER_COMPUTED)
