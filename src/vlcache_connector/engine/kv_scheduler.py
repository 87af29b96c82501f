"""Scheduler side of the KV connector: finds spans, decides what is reused, hands out jobs. It never blocks, it does
no I/O. All reuse is asynchronous for vLLM: see `loads`.

Order of calls in one engine step (vLLM's scheduler): `get_num_new_matched_tokens` and `update_state_after_alloc` for
each waiting request, then `build_connector_meta` once; after the workers ran, `update_connector_output`.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vlcache_connector.engine import debug
from vlcache_connector.engine.audits import Audits
from vlcache_connector.engine.chains import Chains
from vlcache_connector.engine.loads import LoadQueue
from vlcache_connector.engine.metadata import VLCacheMetadata
from vlcache_connector.engine.questions import Lent, lending
from vlcache_connector.engine.requests import PARAMS_KEY, Outcome, RequestState, describe
from vlcache_connector.engine.saves import SavePlanner
from vlcache_connector.engine.session import SchedulerSession, locked
from vlcache_connector.plan.costs import estimate
from vlcache_connector.plan.planner import plan_reuse
from vlcache_connector.types import Mode, Reason, ReusePlan, Span

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from vlcache_connector.engine.metadata import JobResults

logger = init_logger(f"vllm.{__name__}")

_QUIET = {Reason.NO_MEDIA, Reason.MISS, Reason.IN_PREFIX_CACHE, Reason.MODE, Reason.BEHIND_NEW_IMAGE}


class VLCacheScheduler:
    """One per engine. `unsupported` says why the whole engine is declined."""

    def __init__(
        self, vllm_config: "VllmConfig", session: SchedulerSession, block_size: int, unsupported: str | None
    ) -> None:
        self._session = session
        self._session.has_kv, self._session.unsupported = True, unsupported
        self._options = session.options
        self._block_size = block_size
        has_prefix_cache = bool(vllm_config.cache_config.enable_prefix_caching)
        self._chains = Chains(block_size, has_prefix_cache)
        self._loads = LoadQueue(session, vllm_config.scheduler_config.max_num_batched_tokens)
        self._states: dict[str, RequestState] = {}
        self._reported: set[Reason] = set()
        self._saves = SavePlanner(session, self._options.entry_context == "alone")
        self._audits = Audits(session, vllm_config.scheduler_config.max_num_batched_tokens)

    # -- life of a request --------------------------------------------------------------------------------------------

    def bind(self, kv_cache_manager: "KVCacheManager") -> None:
        self._pool = kv_cache_manager.block_pool
        self._saves.bind(kv_cache_manager, self._block_size)
        self._audits.bind(kv_cache_manager.block_pool, self._block_size)

    @locked
    def on_new_request(self, request: "Request") -> None:
        self._session.hear()
        state = describe(request, self._session.keys, self._audits.options, self._session.layout.num_layers)
        state.is_suspended = self._audits.is_off
        self._states[request.request_id] = state
        if state.declined is not None:
            self._tell(state.declined, state.error)
        elif self._may_reuse(state):
            self._chains.resume(state, self._pool)

    @locked
    def get_num_new_matched_tokens(self, request: "Request", num_local: int) -> int | None:
        """How many tokens behind the local hit this connector covers; None while entries are on their way up."""
        state = self._states.get(request.request_id)
        if state is None:
            return 0
        state.is_approximate = state.is_approximate or self._chains.is_used(state, num_local)  # whatever fails below
        spans = [span for span in state.spans if span.end > num_local]
        if self._may_reuse(state) and self._session.fetches.wait_for_spans(
            request.request_id, spans, request.cache_salt
        ):
            return None
        state.is_loaded = False  # the engine asks at first, and again when it took the request's blocks away
        self._trace(state)
        state.plan = self._plan(state, num_local)
        if not isinstance(state.plan, ReusePlan):
            self._chains.leave_unused(state, num_local)
            return 0
        if not self._chains.enter(state, num_local):
            state.plan = Reason.TOO_FEW_TOKENS
            return 0
        return state.plan.end - num_local

    @locked
    def update_state_after_alloc(self, request: "Request", block_ids: list[int], num_external: int) -> None:
        """The request was admitted; with `num_external` > 0 the engine waits until the plan is carried out, and admits
        it again afterwards with 0.
        """
        state = self._states.get(request.request_id)
        if state is None or state.is_loaded:
            assert num_external == 0
            return
        plan = state.plan
        if num_external == 0:
            if isinstance(plan, ReusePlan):  # another connector's answer was taken
                state.plan = Reason.IN_PREFIX_CACHE
                self._chains.leave_unused(state, state.num_local)
            if state.outcome is None:
                state.outcome = Outcome(state.plan, state.num_local)
                self._count_decline(state)
                if state.unused is not None:
                    self._audits.offer(state, state.unused, is_exact_before=True)
            self._session.fetches.release(request.request_id)
            return
        assert isinstance(plan, ReusePlan) and num_external == plan.end - plan.start
        with lending(state, plan, len(block_ids), self._pool, self._block_size) as lent:
            prompt = state.prompt(lent.question.end if lent.question is not None else plan.spans[-1].span.end)
            done, blocks = partial(self._loaded, state, plan, lent), [*block_ids, *lent.block_ids]
            state.load = self._loads.add(request.request_id, prompt, blocks, plan, done, lent.question)
        state.is_approximate = state.is_approximate or plan.first_reused is not None
        self._hold_embeddings(state, plan)
        state.tier = self._session.fetches.tier(request.request_id)
        self._session.fetches.release(request.request_id)

    def _hold_embeddings(self, state: RequestState, plan: ReusePlan) -> None:
        """vLLM drops the pixels of media that an admitted request has covered. If it is preempted and its blocks are
        gone, only the stored encoder output can bring them back: it must not be evicted before the request ends.
        """
        index = self._session.index
        for part in plan.spans:
            embedding = index.get_found(part.span.embedding_key)
            if embedding is not None and embedding not in state.held:
                index.pin(embedding, is_use=False)
                state.held.append(embedding)

    @locked
    def lose(self, request: "Request") -> None:
        """The engine waits for a load of this request, but making its job has failed."""
        state = self._states.get(request.request_id)

        def done(error: str | None) -> None:
            if state is not None and error is not None:
                self._failed(state, error)

        record = self._loads.add_failed(request.request_id, "the reuse job could not be made", done)
        if state is not None:
            state.load = record

    @locked
    def request_finished(self, request: "Request") -> dict[str, Any] | None:
        self._loads.cancel(request.request_id)
        self._session.fetches.forget(request.request_id)
        state = self._states.pop(request.request_id, None)
        if state is None:
            return None
        for entry in state.held:
            self._session.index.unpin(entry)
        debug.finished(state)
        return {PARAMS_KEY: state.report()} if state.reports else None

    # -- once per step ------------------------------------------------------------------------------------------------

    @locked
    def build_connector_meta(self, output: "SchedulerOutput") -> VLCacheMetadata:
        num_tokens = output.total_num_scheduled_tokens
        metadata = VLCacheMetadata(num_tokens, reuse=self._loads.take(num_tokens))
        try:
            self._add_saves(output, metadata)
        except Exception:  # a save that is not made is a future miss; the step's reuse must reach the workers
            logger.exception("VLCache: nothing more is saved in this step")
            self._session.counters.add("failures", label="save")
        return metadata

    def _add_saves(self, output: "SchedulerOutput", metadata: VLCacheMetadata) -> None:
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is not None and state.first_unsaved < len(state.spans):
                self._saves.add_completed(state, state.request.num_computed_tokens + num_tokens, metadata)
        if output.total_num_scheduled_tokens == 0 and not metadata.reuse:
            if (job := self._saves.compiles.next_job()) is not None:
                metadata.compiles.append(job)
            elif (audit := self._audits.next_job()) is not None:
                metadata.audits.append(audit)

    @locked
    def update_connector_output(self, results: "JobResults") -> None:
        self._session.take_results(results)
        self._audits.learn(results.drifts)

    @locked
    def has_pending_work(self) -> bool:
        is_idle = not (self._loads.num_open or self._saves.compiles or self._audits or self._session.has_late_answers)
        return not is_idle

    @locked
    def reset_cache(self) -> None:
        """Forget all entries; what is being written belongs to the old epoch and will never be found."""
        num = self._session.index.clear()
        self._session.keys.forget()
        self._saves.compiles.clear()
        self._audits.reset()
        logger.info("VLCache: the cache was reset, %d entries forgotten", num)

    # -- decisions ----------------------------------------------------------------------------------------------------

    def _may_reuse(self, state: RequestState) -> bool:
        wants = state.declined is None and state.options.mode is Mode.REUSE
        return wants and not state.is_suspended and self._session.unsupported is None

    def _plan(self, state: RequestState, num_local: int) -> ReusePlan | Reason:
        state.num_local = num_local
        if not state.request.mm_features:
            return Reason.NO_MEDIA
        if state.declined is not None:
            return state.declined
        if self._session.unsupported is not None:
            self._tell(self._session.reason, self._session.unsupported)
            return self._session.reason
        if state.options.mode is not Mode.REUSE:
            return Reason.MODE
        state.available = tuple(self._is_available(span) for span in state.spans)
        plan = plan_reuse(
            state.spans,
            state.available,
            state.request.num_tokens,
            num_local,
            self._session.policies[state.options.policy],
            state.options.recompute_ratio,
            self._options.min_reuse_tokens,
            self._options.recompute_tokens,
            self._session.orders(state.spans),
            self._session.layout.num_layers,
        )
        if isinstance(plan, ReusePlan):
            state.unused = plan if self._audits.is_raised else None
            state.estimate = estimate(plan, self._session.prices)
            if state.is_suspended and plan.num_reused > 0:
                return Reason.DRIFT
            if not (state.estimate is None or state.estimate.pays or state.options.at_any_cost):
                return Reason.NO_GAIN
        return plan

    def _is_available(self, span: Span) -> bool:
        found = ((self._session.index.get(key), num_tokens) for _, key, num_tokens in span.entries)
        return all(entry is not None and entry.num_tokens == num_tokens for entry, num_tokens in found)

    def _loaded(self, state: RequestState, plan: ReusePlan, lent: Lent, error: str | None) -> None:
        """All ranks carried out a plan, or one of them could not."""
        self._pool.free_blocks(lent.blocks)
        if error is not None:
            self._failed(state, error)
            return
        state.is_loaded = True
        if state.outcome is None:
            state.outcome = Outcome(plan, plan.start)
            counters = self._session.counters
            counters.add("hits")
            counters.add("reused_tokens", plan.num_reused)
            counters.add("recomputed_tokens", plan.num_recomputed)
            self._audits.offer(state, plan, not self._chains.is_used(state, plan.start))

    def _failed(self, state: RequestState, error: str) -> None:
        """The engine asks for this request again, unless it was aborted."""
        request_id = state.request.request_id
        if request_id not in self._states:
            return
        logger.warning("VLCache: request %s is recomputed by the engine: %s", request_id, error)
        self._session.counters.add("failures", label="reuse")
        state.declined = state.plan = Reason.LOAD_FAILED
        state.is_approximate = self._chains.is_used(state, state.num_local)

    # -- telling ------------------------------------------------------------------------------------------------------

    def _trace(self, state: RequestState) -> None:
        """Note which entries the request would use, and whether they are there: once, not each time the engine asks."""
        session = self._session
        if session.trace is None or state.is_traced or session.has_ec_only:
            return
        state.is_traced = True
        for span in state.spans:
            for kind, key, num_tokens in span.entries:
                if kind == "embedding" or state.options.mode is Mode.REUSE:
                    nbytes, is_hit = session.layout.nbytes(kind, num_tokens), session.index.get(key) is not None
                    session.looked_up(key, nbytes, num_tokens, state.entry_class(kind, span), is_hit)

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
