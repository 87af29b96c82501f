"""Scheduler side of the KV connector: finds spans, decides what is reused, hands out jobs. It never blocks, it does
no I/O.

Order of calls in one engine step (vLLM's scheduler): `get_num_new_matched_tokens` and `update_state_after_alloc` for
each waiting request, then `build_connector_meta` once; after the workers ran, `update_connector_output`.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vlcache_connector.engine.chains import Chains
from vlcache_connector.engine.metadata import ReuseJob, SpanLoad, VLCacheMetadata
from vlcache_connector.engine.requests import PARAMS_KEY, RequestState, describe
from vlcache_connector.engine.saves import SavePlanner
from vlcache_connector.engine.session import SchedulerSession
from vlcache_connector.plan.planner import plan_reuse
from vlcache_connector.policy import POLICIES
from vlcache_connector.types import Mode, Reason, ReusePlan, Span

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from vlcache_connector.engine.metadata import JobResults

logger = init_logger(f"vllm.{__name__}")

_Writer = tuple["Request", int]  # a request, and the first block of it that is not written yet
_QUIET = {Reason.NO_MEDIA, Reason.MISS, Reason.IN_PREFIX_CACHE, Reason.MODE, Reason.BEHIND_NEW_IMAGE}


class VLCacheScheduler:
    """One per engine. `unsupported` says why the whole engine is declined."""

    def __init__(
        self, vllm_config: "VllmConfig", session: SchedulerSession, block_size: int, unsupported: str | None
    ) -> None:
        self._session = session
        self._session.unsupported = unsupported
        self._options = session.options
        self._policy = POLICIES[self._options.policy]
        self._block_size = block_size
        has_prefix_cache = bool(vllm_config.cache_config.enable_prefix_caching)
        self._chains = Chains(self._policy.name, block_size, has_prefix_cache)
        self._max_step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._step_tokens = 0  # recomputed tokens that this step's passes have taken on
        self._states: dict[str, RequestState] = {}
        self._admitted: set[str] = set()  # requests that hold blocks
        self._new_jobs: list[ReuseJob] = []
        self._unconfirmed: dict[int, _Writer] = {}  # job -> the request whose blocks it fills
        self._lost_blocks: set[int] = set()
        self._reported: set[Reason] = set()
        self._saves = SavePlanner(session)
        self._kv_cache_manager: KVCacheManager | None = None

    # -- life of a request --------------------------------------------------------------------------------------------

    def bind(self, kv_cache_manager: "KVCacheManager") -> None:
        self._kv_cache_manager = kv_cache_manager
        self._saves.bind(kv_cache_manager, self._block_size)

    def on_new_request(self, request: "Request") -> None:
        options = self._options
        state = describe(request, self._session.keys, options.recompute_ratio, options.trust_client_uuids)
        self._states[request.request_id] = state
        if state.declined is not None:
            self._tell(state.declined, state.error)
        elif self._may_reuse(state):
            assert self._kv_cache_manager is not None
            self._chains.resume(state, self._kv_cache_manager.block_pool)

    def get_num_new_matched_tokens(self, request: "Request", num_local: int) -> int | None:
        """How many tokens behind the local hit this connector covers; None to be asked again in the next step."""
        if self._builds_on(request, num_local, self._unconfirmed.values()):
            # Whoever it is: until a load is known to have worked, nobody may read the blocks that it fills.
            self._session.counters.add("deferrals", label="unconfirmed_load")
            return None
        state = self._states.get(request.request_id)
        if state is None:
            return 0
        state.plan = self._plan(state, num_local)
        if not isinstance(state.plan, ReusePlan):
            self._chains.leave_unused(state, num_local)
            return 0
        if self._must_wait(state, num_local):
            return None
        if not self._chains.enter(state, num_local):
            state.plan = Reason.TOO_FEW_TOKENS
            return 0
        return state.plan.end - num_local

    def update_state_after_alloc(self, request: "Request", block_ids: list[int], num_external: int) -> None:
        """The request was admitted; with `num_external` > 0 the engine relies on the plan."""
        state = self._states.get(request.request_id)
        if state is None:
            assert num_external == 0
            return
        self._admitted.add(request.request_id)
        plan = state.plan
        if num_external == 0:
            if isinstance(plan, ReusePlan):  # another connector's answer was taken
                state.plan = Reason.IN_PREFIX_CACHE
                self._chains.leave_unused(state, state.num_local)
            self._count_decline(state)
            return
        assert isinstance(plan, ReusePlan) and num_external == plan.end - plan.start
        state.num_local = plan.start
        state.is_approximate = state.is_approximate or plan.first_reused is not None
        self._step_tokens += plan.num_recomputed
        self._new_jobs.append(self._make_job(state, plan, block_ids))
        counters = self._session.counters
        counters.add("hits")
        counters.add("reused_tokens", plan.num_reused)
        counters.add("recomputed_tokens", plan.num_recomputed)

    def lose(self, request: "Request", block_ids: list[int], num_external: int) -> None:
        """The job of an admitted request could not be made: its blocks must be computed by the engine after all."""
        state = self._states.get(request.request_id)
        start = state.plan.start if state is not None and isinstance(state.plan, ReusePlan) else 0
        lost = self._blocks_of(block_ids, start, start + num_external)
        self._lost_blocks.update(lost)
        if state is not None:
            self._fail(state, "the reuse job could not be made", lost)

    def request_finished(self, request: "Request") -> dict[str, Any] | None:
        state = self._states.pop(request.request_id, None)
        self._admitted.discard(request.request_id)
        return {PARAMS_KEY: state.report()} if state is not None and state.reports else None

    # -- once per step ------------------------------------------------------------------------------------------------

    def build_connector_meta(self, output: "SchedulerOutput") -> VLCacheMetadata:
        metadata = VLCacheMetadata(reuse=self._new_jobs, lost_blocks=self._lost_blocks)
        self._new_jobs, self._lost_blocks, self._step_tokens = [], set(), 0
        try:
            self._add_saves(output, metadata)
        except Exception:  # a save that is not made is a future miss; the step's reuse jobs must reach the workers
            logger.exception("VLCache: nothing more is saved in this step")
            self._session.counters.add("failures", label="save")
        return metadata

    def _add_saves(self, output: "SchedulerOutput", metadata: VLCacheMetadata) -> None:
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is not None and state.first_unsaved < len(state.spans):
                self._saves.add_completed(state, state.request.num_computed_tokens + num_tokens, metadata)
        if output.total_num_scheduled_tokens == 0:
            job = self._saves.compiles.next_job()
            if job is not None:
                metadata.compiles.append(job)

    def update_connector_output(self, results: "JobResults") -> None:
        self._session.take_results(results)

    def has_pending_work(self) -> bool:
        return len(self._saves.compiles) > 0

    def reset_cache(self) -> None:
        """Forget all entries; what is being written belongs to the old epoch and will never be found."""
        num = self._session.index.clear()
        self._session.keys.epoch += 1
        self._saves.compiles.clear()
        logger.info("VLCache: the cache was reset, %d entries forgotten", num)

    # -- decisions ----------------------------------------------------------------------------------------------------

    def _may_reuse(self, state: RequestState) -> bool:
        return state.declined is None and state.options.mode is Mode.REUSE and self._session.unsupported is None

    def _plan(self, state: RequestState, num_local: int) -> ReusePlan | Reason:
        state.num_local = num_local
        if not state.request.mm_features:
            return Reason.NO_MEDIA
        if state.declined is not None:
            return state.declined
        if self._session.unsupported is not None:
            self._tell(Reason.ENGINE, self._session.unsupported)
            return Reason.ENGINE
        if state.options.mode is not Mode.REUSE:
            return Reason.MODE
        return plan_reuse(
            state.spans,
            [self._is_available(span) for span in state.spans],
            state.request.num_tokens,
            num_local,
            self._policy,
            state.options.recompute_ratio,
            self._options.min_reuse_tokens,
        )

    def _is_available(self, span: Span) -> bool:
        kv, embedding = self._session.index.get(span.kv_key), self._session.index.get(span.embedding_key)
        return kv is not None and embedding is not None and kv.num_tokens == embedding.num_tokens == span.length

    def _must_wait(self, state: RequestState, num_local: int) -> bool:
        """Whether to ask again in the next step: passes run before the step's forward, and share its token budget."""
        assert isinstance(state.plan, ReusePlan)
        if self._builds_on(state.request, num_local, self._computing()):
            self._session.counters.add("deferrals", label="running_step")
            return True
        if self._step_tokens and self._step_tokens + state.plan.num_recomputed > self._max_step_tokens:
            self._session.counters.add("deferrals", label="step_budget")
            return True
        return False

    def _computing(self) -> Iterator[_Writer]:
        """Requests that the step being scheduled computes, with the first block that is not written yet."""
        for request_id in self._admitted:
            request = self._states[request_id].request
            if request.status is RequestStatus.RUNNING:
                yield request, request.num_computed_tokens // self._block_size

    def _builds_on(self, request: "Request", num_local: int, writers: Iterable[_Writer]) -> bool:
        """Whether the local hit contains blocks that one of these writers has yet to fill.

        vLLM gives blocks their hashes at allocation, so such blocks are handed out before they were written. Hashes
        are chained: the hit contains the writer's first unwritten block exactly when the hashes there agree.
        """
        num_hit = num_local // self._block_size
        for other, first in writers:
            is_hit = other is not request and first < min(num_hit, len(other.block_hashes))
            if is_hit and other.block_hashes[first] == request.block_hashes[first]:
                return True
        return False

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _blocks_of(self, block_ids: list[int], start: int, end: int) -> tuple[int, ...]:
        return tuple(block_ids[start // self._block_size : -(-end // self._block_size)])

    def _make_job(self, state: RequestState, plan: ReusePlan, block_ids: list[int]) -> ReuseJob:
        index = self._session.index
        loads: list[SpanLoad] = []
        pinned = []
        for part in plan.spans:
            kv, embedding = index.get(part.span.kv_key), index.get(part.span.embedding_key)
            assert kv is not None and embedding is not None, "an entry vanished between look-up and admission"
            pinned += [kv, embedding]
            loads.append(SpanLoad(part.span.offset, part.span.length, kv.extent, embedding.extent, part.reused))
        owned = self._blocks_of(block_ids, plan.start, plan.end)

        def done(error: str | None) -> None:
            del self._unconfirmed[job_id]
            if error is not None:
                self._fail(state, error, owned)

        job_id = self._session.new_job(pinned=pinned, on_done=done)
        self._unconfirmed[job_id] = (state.request, plan.start // self._block_size)
        return ReuseJob(
            job_id,
            state.request.request_id,
            state.prompt(plan.spans[-1].span.end),
            tuple(block_ids),
            tuple(loads),
            plan.recomputed,
            owned,
        )

    def _fail(self, state: RequestState, error: str, block_ids: tuple[int, ...]) -> None:
        """The engine computes the request after all. Its half-written blocks must not be found by anyone meanwhile."""
        logger.warning("VLCache: request %s is recomputed by the engine: %s", state.request.request_id, error)
        self._session.counters.add("failures", label="reuse")
        state.declined = state.plan = Reason.LOAD_FAILED
        state.is_approximate = self._chains.is_used(state, state.num_local)
        assert self._kv_cache_manager is not None
        self._kv_cache_manager.evict_blocks(set(block_ids))

    # -- telling ------------------------------------------------------------------------------------------------------

    def _count_decline(self, state: RequestState) -> None:
        reason = state.plan
        if isinstance(reason, Reason) and reason is not Reason.NO_MEDIA:
            self._session.counters.add("declines", label=str(reason))

    def _tell(self, reason: Reason, detail: str | None = None) -> None:
        """Log a reason once per engine; an invalid option every time, because each has its own text."""
        if reason in _QUIET or (reason in self._reported and reason is not Reason.INVALID_OPTIONS):
            return
        self._reported.add(reason)
        logger.warning("VLCache leaves requests to the engine: %s%s", reason, f" ({detail})" if detail else "")
