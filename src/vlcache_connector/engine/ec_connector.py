"""`VLCacheECConnector`: stores encoder outputs and serves them instead of running the encoder.

`VLCacheConnector` sets it up by itself and shares its host tier with it; it also works alone, through `--ec-transfer-
config`.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)
from vllm.logger import init_logger

from vlcache_connector.config import Options
from vlcache_connector.engine.compat import require_supported_engine
from vlcache_connector.engine.ec_sides import ECScheduler, ECWorker
from vlcache_connector.engine.encoder_flag import encoder_reason
from vlcache_connector.engine.metadata import VLCacheECMetadata, VLCacheECWorkerMetadata
from vlcache_connector.engine.session import (
    SCHEDULERS,
    WORKERS,
    SchedulerSession,
    WorkerSession,
    entry_layout,
    require_family,
)
from vlcache_connector.types import Mode

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ECConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")


class VLCacheECConnector(ECConnectorBase):
    """What vLLM calls; forwards to the side of its process."""

    def __init__(self, vllm_config: "VllmConfig", role: ECConnectorRole) -> None:
        require_supported_engine()
        super().__init__(vllm_config, role)
        assert vllm_config.ec_transfer_config is not None
        options = Options.parse(vllm_config.ec_transfer_config.ec_connector_extra_config)
        require_family(vllm_config)
        layout = entry_layout(vllm_config, None)
        self._instance = vllm_config.instance_id
        self._scheduler: ECScheduler | None = None
        self._worker: ECWorker | None = None
        if role is ECConnectorRole.SCHEDULER:
            session = SCHEDULERS.attach(self._instance, lambda: SchedulerSession(vllm_config, options, layout))
            reason = encoder_reason(vllm_config)
            if reason is not None:
                logger.warning("VLCache stores no encoder outputs: %s", reason)
            self._scheduler = ECScheduler(session, reason is None and session.options.mode is not Mode.OFF)
        else:
            self._worker = ECWorker(WORKERS.attach(self._instance, lambda: WorkerSession(vllm_config, options, layout)))

    # -- scheduler side -----------------------------------------------------------------------------------------------

    def ensure_cache_available(self, request: "Request", num_computed_tokens: int) -> bool:
        assert self._scheduler is not None
        return self._scheduler.about_to_ask(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        assert self._scheduler is not None
        return self._scheduler.has_cache_item(identifier)

    def update_state_after_alloc(self, request: "Request", index: int) -> None:
        assert self._scheduler is not None
        self._scheduler.update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> ECConnectorMetadata:
        assert self._scheduler is not None
        return self._scheduler.build_connector_meta(scheduler_output.total_num_scheduled_tokens > 0)

    def update_connector_output(self, connector_output: "ECConnectorOutput") -> None:
        assert self._scheduler is not None
        metadata = connector_output.ec_connector_worker_meta
        if isinstance(metadata, VLCacheECWorkerMetadata):
            self._scheduler.update_connector_output(metadata.results)

    def request_finished(self, request: "Request") -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        self._scheduler.request_finished(request)
        return False, None

    # -- worker side --------------------------------------------------------------------------------------------------

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        assert self._worker is not None
        self._worker.start_load(encoder_cache, self._step())

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        assert self._worker is not None
        self._worker.save(mm_hash, self._step())

    def build_connector_worker_meta(self) -> ECConnectorWorkerMetadata | None:
        assert self._worker is not None
        results = self._worker.finish_step(self._step())
        return VLCacheECWorkerMetadata(results) if results is not None else None

    def _step(self) -> VLCacheECMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, VLCacheECMetadata)
        return metadata

    # -- both sides ---------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        registry: Any = SCHEDULERS if self._scheduler is not None else WORKERS
        registry.detach(self._instance)
