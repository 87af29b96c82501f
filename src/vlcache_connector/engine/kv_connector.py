"""`VLCacheConnector`: what vLLM calls. It only forwards to the side of its process, and turns errors into plain vLLM.

Scheduler side: `kv_scheduler.VLCacheScheduler`. Worker side: `kv_worker.VLCacheWorker`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vlcache_connector.config import Options
from vlcache_connector.engine.answers import StepAnswers, answer_all_failed
from vlcache_connector.engine.compat import require_supported_engine
from vlcache_connector.engine.encoder_flag import share_encoder_connector
from vlcache_connector.engine.kv_scheduler import VLCacheScheduler
from vlcache_connector.engine.kv_worker import VLCacheWorker
from vlcache_connector.engine.metadata import VLCacheMetadata, VLCacheWorkerMetadata
from vlcache_connector.engine.models import family_of
from vlcache_connector.engine.session import SCHEDULERS, WORKERS, SchedulerSession, WorkerSession, entry_layout
from vlcache_connector.engine.siblings import outer_config, register, sibling_reason
from vlcache_connector.engine.stats import VLCachePromMetrics, VLCacheStats
from vlcache_connector.engine.support import SWITCHED_OFF, engine_reason, warn_of_embedding_inputs
from vlcache_connector.errors import OptionError, VLCacheError
from vlcache_connector.metrics import Counters
from vlcache_connector.types import Mode, Reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")
T = TypeVar("T")


class VLCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """Reuses the KV cache and the encoder output of recurring images and videos. Options:
    `vlcache_connector.config.Options`.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        require_supported_engine()
        super().__init__(vllm_config, role, kv_cache_config)
        options = Options.parse(self._kv_transfer_config.kv_connector_extra_config)
        self._instance = vllm_config.instance_id
        outer = outer_config(vllm_config)
        beside = sibling_reason(outer)
        is_off = options.mode is Mode.OFF
        self._reason = SWITCHED_OFF if is_off else engine_reason(vllm_config, kv_cache_config) or beside
        layout = entry_layout(vllm_config, kv_cache_config if self._reason is None else None)
        self._scheduler: VLCacheScheduler | None = None
        self._worker: VLCacheWorker | None = None
        self._owed = StepAnswers()  # for steps that the worker side could not work on at all
        self._counters = Counters()
        has_entries = not is_off and family_of(vllm_config.model_config.architectures) is not None
        if role is KVConnectorRole.SCHEDULER:
            # A failed load must end as computation by the engine, not as a failed request (vLLM's default).
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
            outer.kv_transfer_config.kv_load_failure_policy = "recompute"
            warn_of_embedding_inputs(vllm_config)
            session = SCHEDULERS.attach(self._instance, lambda: SchedulerSession(vllm_config, options, layout))
            self._counters = session.counters
            session.reason = Reason.SIBLING if self._reason == beside is not None else Reason.ENGINE
            self._start_scheduler(vllm_config, kv_cache_config, session)
        elif has_entries:  # otherwise there is nothing to store, and no memory is taken
            worker_session = WORKERS.attach(self._instance, lambda: WorkerSession(vllm_config, options, layout))
            worker_session.adopt(options, layout)
            self._counters = worker_session.counters
            self._start_worker(vllm_config, kv_cache_config, worker_session)
        if has_entries:
            share_encoder_connector(outer, self._kv_transfer_config, is_worker=role is KVConnectorRole.WORKER)

    def _start_scheduler(
        self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", session: SchedulerSession
    ) -> None:
        if self._reason is not None:
            logger.warning("VLCache reuses no KV in this engine: %s", self._reason)
        groups = kv_cache_config.kv_cache_groups
        block_size = groups[0].kv_cache_spec.block_size if groups else 1  # without any, nothing is ever planned
        self._scheduler = VLCacheScheduler(vllm_config, session, block_size, self._reason)

    def _start_worker(
        self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", session: WorkerSession
    ) -> None:
        if self._reason is not None:
            return
        try:
            self._worker = VLCacheWorker(vllm_config, kv_cache_config, session)
        except VLCacheError as error:
            self._reason = str(error)
            logger.warning("VLCache reuses no KV in this engine: %s", self._reason)

    def _guard(self, stage: str, work: Callable[[], T], otherwise: T) -> T:
        """Run a hook; an error inside the connector is logged and counted, and the engine goes on without it."""
        try:
            return work()
        except Exception:
            logger.exception("VLCache: error in %s; the request is computed by the engine", stage)
            self._counters.add("failures", label=stage)
            return otherwise

    # -- scheduler side -----------------------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a lost save is only a future miss

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        assert self._scheduler is not None
        self._scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: "Request") -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        self._guard("look-up", lambda: scheduler.on_new_request(request), None)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        scheduler = self._scheduler
        assert scheduler is not None
        none: int | None = 0
        found = self._guard("look-up", lambda: scheduler.get_num_new_matched_tokens(request, num_computed_tokens), none)
        return found, bool(found)  # always asynchronous: see `loads`

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        block_ids = blocks.get_block_ids()[0]
        try:
            scheduler.update_state_after_alloc(request, block_ids, num_external_tokens)
        except Exception:
            logger.exception("VLCache: request %s could not be planned", request.request_id)
            if num_external_tokens > 0:
                scheduler.lose(request)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        assert self._scheduler is not None
        return self._scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        scheduler, metadata = self._scheduler, connector_output.kv_connector_worker_meta
        assert scheduler is not None
        if isinstance(metadata, VLCacheWorkerMetadata):
            results = metadata.results
            self._guard("results", lambda: scheduler.update_connector_output(results), None)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        scheduler = self._scheduler
        assert scheduler is not None
        no_report: dict[str, Any] | None = None
        return False, self._guard("results", lambda: scheduler.request_finished(request), no_report)

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_pending_work()

    def reset_cache(self) -> bool | None:
        assert self._scheduler is not None
        self._scheduler.reset_cache()
        return True

    # -- worker side --------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is None:
            return
        try:
            self._worker.register_pages(kv_caches)
        except OptionError:  # the user asked for what this engine cannot do: say so now, not in every request
            raise
        except Exception as error:
            self._worker, self._reason = None, f"the pages of this engine cannot be used: {error}"
            logger.exception("VLCache reuses no KV in this engine: its pages cannot be used")

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin_step()

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def finish_forward(self) -> None:
        if self._worker is not None:
            self._worker.end_forward(self._step())

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.run_step(self._step())
        else:
            self._owed = answer_all_failed(self._step(), self._reason or "no worker")

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        answers = self._worker.answers if self._worker is not None else self._owed
        return KVConnectorTransferResults(finished_recving=answers.finished, failed_recving=answers.failed)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """The last hook of a step: hands over its answers."""
        if self._worker is not None:
            answers = self._worker.take_answers()
        else:
            answers, self._owed = self._owed, StepAnswers()
        return VLCacheWorkerMetadata(answers.results) if answers.results else None

    def _step(self) -> VLCacheMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, VLCacheMetadata)
        return metadata

    # -- both sides ---------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> "KVConnectorStats | None":
        counts = self._counters.take()
        return VLCacheStats(counts) if counts else None

    def shutdown(self) -> None:
        registry: Any = SCHEDULERS if self._scheduler is not None else WORKERS
        registry.detach(self._instance)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> "KVConnectorStats | None":
        return VLCacheStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> "KVConnectorPromMetrics | None":
        return VLCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


register(VLCacheConnector.__name__, __name__)
