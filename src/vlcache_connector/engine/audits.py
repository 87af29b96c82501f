"""Audits: some reused requests are computed in full as well when the engine is idle, to see how far reuse is off; the
drift guard then decides on the default recompute ratio, and whether reuse goes on.

Scheduler side. An audit repeats a request's reuse, with the entries that are there now, in scratch blocks of the
engine's own block pool. It keeps nothing while it waits: where entries were evicted meanwhile, it is dropped. So audits
are in nobody's way, and a request need not even have reused anything: while reuse is switched off, what it would have
reused is audited.
"""

import hashlib
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vlcache_connector.engine.metadata import AuditJob, ReusePiece, SpanLoad
from vlcache_connector.engine.requests import RequestState
from vlcache_connector.engine.session import SchedulerSession
from vlcache_connector.exec.audit import Drift
from vlcache_connector.exec.model import Prompt
from vlcache_connector.plan.drift import Change, DriftGuard, steps_of
from vlcache_connector.plan.planner import plan_reuse
from vlcache_connector.store.host import HostEntry
from vlcache_connector.types import Measure, Ratio, ReusePlan, Run, Span

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

logger = init_logger(f"vllm.{__name__}")

_MAX_QUEUED = 8
_MAX_PASSES = 4  # of each of the two versions: a request that arrives during an audit waits for it
_WORST_KL = 100.0  # shown where damaged values left no distribution


@dataclass(frozen=True, slots=True)
class _Waiting:
    request_id: str
    prompt: Prompt  # to its end
    spans: tuple[Span, ...]
    covered: Run  # by the request's plan; what stands before was computed
    own: tuple[str, Ratio] | None  # policy and ratio, where the request chose them itself


class Audits:
    """One per engine. `max_pass_tokens`: what the engine batches at most."""

    def __init__(self, session: SchedulerSession, max_pass_tokens: int) -> None:
        self._session = session
        self._max_tokens = _MAX_PASSES * max_pass_tokens
        engine = session.options
        self._guard = DriftGuard(steps_of(session.policies[engine.policy], engine.recompute_ratio), engine.audit_kl)
        self._queue: deque[_Waiting] = deque()
        self._open: dict[int, int | None] = {}  # job -> level of the guard that it is to hear of
        self._pool: BlockPool | None = None
        self._block_size = 0
        self._num_offered = 0
        self.options = engine
        """The engine's options, with the default ratio that the guard wants."""
        self._take_level()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def is_off(self) -> bool:
        """Whether reuse is switched off."""
        return self._guard.is_off

    @property
    def is_raised(self) -> bool:
        """Whether the guard keeps from reuse what would pay otherwise. The way back leads over audits, also of plans
        that are not carried out.
        """
        return self._guard.level > 0

    def bind(self, pool: "BlockPool", block_size: int) -> None:
        self._pool, self._block_size = pool, block_size

    # -- on the way in ------------------------------------------------------------------------------------------------

    def offer(self, state: RequestState, plan: ReusePlan, is_exact_before: bool) -> None:
        """A request has carried out a plan, or would have. `is_exact_before`: what stands before it was computed."""
        if not self._session.options.audit_fraction or plan.num_reused == 0 or not self._is_drawn(plan):
            return
        num_tokens = state.request.num_prompt_tokens
        if len(state.spans) < len(state.request.mm_features):
            self._drop("modality")  # some item of the prompt cannot be computed by us
        elif num_tokens > self._max_tokens:
            self._drop("too_long")
        elif len(self._queue) >= _MAX_QUEUED:
            self._drop("queue_full")
        else:
            own = None if state.follows_engine else (state.options.policy, state.options.recompute_ratio)
            covered = Run(plan.start if is_exact_before else 0, plan.end)
            prompt = state.prompt(num_tokens)
            self._queue.append(_Waiting(state.request.request_id, prompt, state.spans, covered, own))

    def _is_drawn(self, plan: ReusePlan) -> bool:
        """Which requests are audited depends on their order and content, on nothing else."""
        self._num_offered += 1
        content = b"".join(part.span.kv_key for part in plan.spans)
        drawn = hashlib.sha256(self._num_offered.to_bytes(8, "little") + content).digest()[:8]
        return int.from_bytes(drawn, "little") < self._session.options.audit_fraction * 2**64

    def _drop(self, reason: str) -> None:
        self._session.counters.add("dropped_audits", label=reason)

    # -- in idle steps ------------------------------------------------------------------------------------------------

    def next_job(self) -> AuditJob | None:
        """The next audit, or None. What cannot be audited now is dropped, so the queue always drains."""
        while self._queue:
            job = self._make_job(self._queue.popleft())
            if job is not None:
                return job
        return None

    def _make_job(self, waiting: _Waiting) -> AuditJob | None:
        level = self._guard.level_to_audit if waiting.own is None else None
        plan = self._plan(waiting, level)
        entries = self._entries(waiting, plan) if plan is not None else None
        if plan is None or entries is None:
            self._drop("gone")
            return None
        num_blocks = -(-len(waiting.prompt.token_ids) // self._block_size)
        if self._pool is None or 2 * num_blocks > self._pool.get_num_free_blocks():  # free blocks cache prefixes
            self._drop("no_blocks")
            return None
        return self._start(self._pool, num_blocks, level, waiting, plan, entries)

    def _start(
        self,
        pool: "BlockPool",
        num_blocks: int,
        level: int | None,
        waiting: _Waiting,
        plan: ReusePlan,
        entries: list[tuple[HostEntry | None, HostEntry]],
    ) -> AuditJob:
        """Takes blocks and pins; both are given back when all ranks have answered."""
        index, pinned = self._session.index, [entry for pair in entries for entry in pair if entry is not None]
        blocks = pool.get_new_blocks(num_blocks)
        for entry in pinned:
            index.pin(entry, is_use=False)

        def done(error: str | None) -> None:
            pool.free_blocks(blocks)
            for entry in pinned:
                index.unpin(entry)
            if error is not None and job_id in self._open:
                del self._open[job_id]
                self._drop("failed")

        job_id = self._session.new_job(on_done=done)
        self._open[job_id] = level
        return _job(job_id, waiting, plan, entries, tuple(block.block_id for block in blocks))

    def _plan(self, waiting: _Waiting, level: int | None) -> ReusePlan | None:
        if level is None:
            assert waiting.own is not None
            policy, ratio = waiting.own
        else:
            policy, ratio = self._session.options.policy, self._guard.ratio(level)
        covered = waiting.covered
        known = [span.offset < covered.end for span in waiting.spans]
        num_tokens = len(waiting.prompt.token_ids)
        session, spans = self._session, waiting.spans
        limit, num_layers = session.options.recompute_tokens, session.layout.num_layers
        chosen, orders = session.policies[policy], session.orders(spans)
        plan = plan_reuse(spans, known, num_tokens, covered.start, chosen, ratio, 1, limit, orders, num_layers)
        return plan if isinstance(plan, ReusePlan) and plan.num_reused > 0 else None

    def _entries(self, waiting: _Waiting, plan: ReusePlan) -> list[tuple[HostEntry | None, HostEntry]] | None:
        """KV, where the plan wants it, and embedding of each span; None where one is gone."""
        index, planned = self._session.index, {part.span for part in plan.spans}
        found: list[tuple[HostEntry | None, HostEntry]] = []
        for span in waiting.spans:
            kv, embedding = index.get(span.kv_key) if span in planned else None, index.get(span.embedding_key)
            if embedding is None or embedding.num_tokens != span.num_embedded:
                return None
            if span in planned and (kv is None or kv.num_tokens != span.length):
                return None
            found.append((kv, embedding))
        return found

    # -- results ------------------------------------------------------------------------------------------------------

    def learn(self, drifts: Mapping[int, Drift]) -> None:
        """Results of audits that all ranks answered; those from before a reset are about other weights."""
        for job_id, drift in drifts.items():
            if job_id not in self._open:
                continue
            level = self._open.pop(job_id)
            if drift.kl is None:
                self._drop("failed")
                continue
            self._count(drift, drift.kl)
            change = self._guard.add(level, drift.kl) if level is not None else None
            if change is not None:
                self._apply(change)

    def reset(self) -> None:
        """All entries are forgotten, perhaps for new weights."""
        for _ in range(len(self._queue) + len(self._open)):
            self._drop("reset")
        self._queue.clear()
        self._open.clear()
        if self._guard.level > 0:
            logger.info("VLCache drift guard: the cache was reset, reuse goes on as configured")
        self._guard.reset()
        self._take_level()

    def _count(self, drift: Drift, kl: float) -> None:
        counters = self._session.counters
        counters.add("audits")
        counters.observe("drift_kl", kl if math.isfinite(kl) else _WORST_KL)
        if not drift.is_same_token:
            counters.add("audit_disagreements")
        for layer, distance in enumerate(drift.distances):
            if math.isfinite(distance):
                counters.add("drift_kv", distance, label=str(layer))

    def _apply(self, change: Change) -> None:
        self._take_level()
        guard, limit = self._guard, self._session.options.audit_kl
        is_worse, audited = change.after > change.before, guard.ratio(min(change.before, change.after))
        found = (
            f"over the last {change.num_audits} audits at a recompute ratio of {audited:g} the first token was "
            f"{change.mean_kl:.3g} nats (KL) from full computation on average, "
            f"{'above' if is_worse else 'well within'} the limit of {limit:g}"
        )
        if guard.is_off:
            then = "reuse is switched off for this model until audits are good again"
        elif guard.is_off_at(change.before):
            then = f"reuse is switched on again, with a default ratio of {guard.ratio(change.after):g}"
        else:
            word = "raised" if is_worse else "lowered"
            then = f"the default ratio is {word} from {guard.ratio(change.before):g} to {guard.ratio(change.after):g}"
        logger.warning("VLCache drift guard: %s; %s", found, then)

    def _take_level(self) -> None:
        ratio = self._guard.ratio(self._guard.level)
        self._session.counters.set("recompute_ratio", 1.0 if self._guard.is_off else ratio)
        self.options = replace(self._session.options, recompute_ratio=ratio)


def _job(
    job_id: int,
    waiting: _Waiting,
    plan: ReusePlan,
    entries: list[tuple[HostEntry | None, HostEntry]],
    block_ids: tuple[int, ...],
) -> AuditJob:
    found = dict(zip(waiting.spans, entries, strict=True))
    loads: list[SpanLoad] = []
    for part in plan.spans:
        span, (kv, embedding) = part.span, found.pop(part.span)
        assert kv is not None
        loads.append(SpanLoad(span.offset, span.length, kv.extent, embedding.extent, part.reused, part.narrowings))
    end = len(waiting.prompt.token_ids)
    computed = (Run(0, plan.start), *plan.recomputed, Run(plan.end, end))
    piece = ReusePiece(
        job_id,
        f"audit {job_id} of {waiting.request_id}",
        waiting.prompt,
        block_ids,
        tuple(loads),
        tuple(run for run in computed if len(run)),
        is_last=True,
        shifts=plan.shifts,
        measure=plan.measure,
        question=Run(plan.end, end) if plan.measure is Measure.ATTENTION and end > plan.end else None,
    )
    others = tuple((span.offset, embedding.extent) for span, (_, embedding) in found.items())
    return AuditJob(piece, others, waiting.request_id)
