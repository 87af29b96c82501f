"""The two sides of the encoder connector. Encoder outputs do not depend on the prompt, so they are exact in every
mode.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vlcache_connector.engine.kv_worker import save_embedding
from vlcache_connector.engine.live import encode_again
from vlcache_connector.engine.metadata import EmbeddingJob, JobResults, VLCacheECMetadata
from vlcache_connector.engine.requests import wants_embeddings
from vlcache_connector.engine.session import SchedulerSession, WorkerSession
from vlcache_connector.engine.support import feature_reason
from vlcache_connector.store.host import HostEntry

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An encoder output that this step produces and that is to be saved."""

    identifier: str
    num_tokens: int
    request_id: str
    index: int


class ECScheduler:
    """Scheduler side. vLLM asks `has_cache_item` by identifier only, right after it named the request."""

    def __init__(self, session: SchedulerSession, is_enabled: bool = True) -> None:
        self._session = session
        self._is_enabled = is_enabled
        self._salt: str | None = None
        self._num_embeds: dict[str, int] = {}  # of the media of the request that vLLM is asking for
        self._loads: list[tuple[_Wanted, HostEntry, int]] = []

    def about_to_ask(self, request: "Request") -> None:
        self._salt, self._num_embeds = request.cache_salt, {}
        if self._is_enabled and wants_embeddings(request):
            self._num_embeds = {f.identifier: f.mm_position.get_num_embeds() for f in request.mm_features}

    def has_cache_item(self, identifier: str) -> bool:
        num_embeds = self._num_embeds.get(identifier)
        return num_embeds is not None and self._find(identifier, self._salt, num_embeds) is not None

    def _find(self, identifier: str, salt: str | None, num_embeds: int) -> HostEntry | None:
        """The entry, unless it is of another size: a client can give two pictures one UUID that looks like a hash."""
        entry = self._session.index.get(self._session.keys.embedding(identifier, salt))
        return entry if entry is not None and entry.num_tokens == num_embeds else None

    def update_state_after_alloc(self, request: "Request", index: int) -> None:
        """This step fills the engine's encoder cache with the item: from the slab if it is there, or by the encoder."""
        session, feature = self._session, request.mm_features[index]
        if not self._is_enabled or not wants_embeddings(request):
            return
        key = session.keys.embedding(feature.identifier, request.cache_salt)
        item = _Wanted(feature.identifier, feature.mm_position.get_num_embeds(), request.request_id, index)
        entry = self._find(feature.identifier, request.cache_salt, item.num_tokens)
        if entry is not None:
            # Pinned at once: the same answer made the scheduler skip the encoder.
            self._loads.append((item, entry, session.new_job(pinned=[entry])))
            session.counters.add("loaded_embeddings")
        elif feature_reason(feature, session.options.trust_client_uuids) is None and not session.index.holds(key):
            session.wanted_embeddings[key] = item

    def build_connector_meta(self, runs_forward: bool) -> VLCacheECMetadata:
        """Jobs of the step. Without a forward the workers never see them: loads wait, the encoder will run later."""
        metadata, session = VLCacheECMetadata(), self._session
        if runs_forward:
            metadata.loads = [_job(item, loaded, job_id) for item, loaded, job_id in self._loads]
            self._loads = []
            for key, item in session.wanted_embeddings.items():
                if session.index.holds(key):
                    continue
                entry = session.reserve(key, session.layout.embedding_nbytes(item.num_tokens), item.num_tokens)
                if entry is not None:
                    metadata.saves.append(_job(item, entry, session.new_job(written=entry)))
        session.wanted_embeddings.clear()
        return metadata

    def update_connector_output(self, results: JobResults) -> None:
        self._session.take_results(results)


class ECWorker:
    """Worker side."""

    def __init__(self, session: WorkerSession) -> None:
        self._session = session
        self._results = JobResults()

    def start_load(self, encoder_cache: dict[str, torch.Tensor], metadata: VLCacheECMetadata) -> None:
        self._session.encoder_cache = encoder_cache
        for job in metadata.loads:
            try:
                encoder_cache[job.identifier] = self._load(job)
                self._results.succeeded[job.job_id] = 1
            except Exception as error:
                logger.exception("VLCache: an embedding could not be loaded; the encoder runs instead")
                self._session.counters.add("failures", label="load_embedding")
                self._results.failed[job.job_id] = f"load: {error}"
                encode_again(job.request_id, job.index)

    def save(self, identifier: str, metadata: VLCacheECMetadata) -> None:
        """The encoder has just put `identifier` into the engine's encoder cache."""
        for job in metadata.saves:
            if job.identifier != identifier or job.job_id in self._results.succeeded:
                continue
            try:
                save_embedding(self._session, job)
                self._results.succeeded[job.job_id] = 1
            except Exception as error:
                logger.exception("VLCache: an embedding could not be saved; it will simply not be found")
                self._session.counters.add("failures", label="save")
                self._results.failed[job.job_id] = f"save: {error}"

    def finish_step(self, metadata: VLCacheECMetadata) -> JobResults | None:
        """All answers of the step; a save that the encoder never reached has failed."""
        results, self._results = self._results, JobResults()
        for job in metadata.saves:
            if job.job_id not in results.succeeded:
                results.failed.setdefault(job.job_id, "the encoder did not run")
        return results if results.succeeded or results.failed else None

    def _load(self, job: EmbeddingJob) -> torch.Tensor:
        rows = self._session.slab.embedding(job.extent, job.num_tokens)
        # A copy: the entry may be evicted while the engine still uses the rows.
        return rows.to(current_platform.device_type, copy=True)


def _job(item: _Wanted, entry: HostEntry, job_id: int) -> EmbeddingJob:
    return EmbeddingJob(job_id, item.identifier, item.num_tokens, entry.extent, item.request_id, item.index)
