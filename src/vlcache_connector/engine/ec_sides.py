"""The two sides of the encoder connector. Encoder outputs do not depend on the prompt, so they are exact in every
mode.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vlcache_connector.engine.fetches import Wanted
from vlcache_connector.engine.kv_worker import save_embedding
from vlcache_connector.engine.live import encode_again
from vlcache_connector.engine.metadata import EmbeddingJob, JobResults, VLCacheECMetadata
from vlcache_connector.engine.requests import wants_embeddings
from vlcache_connector.engine.session import SchedulerSession, WorkerSession, locked
from vlcache_connector.engine.support import feature_reason
from vlcache_connector.exec.stopwatch import Stopwatch
from vlcache_connector.plan.keys import entry_class
from vlcache_connector.store.host import HostEntry
from vlcache_connector.types import EntryClass

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An encoder output that this step produces and that is to be saved."""

    identifier: str
    num_tokens: int
    request_id: str
    index: int
    entry_class: EntryClass


class ECScheduler:
    """Scheduler side. vLLM asks `has_cache_item` by identifier only, right after it named the request."""

    def __init__(self, session: SchedulerSession, is_enabled: bool = True) -> None:
        self._session = session
        self._is_enabled = is_enabled
        self._salt: str | None = None
        self._asked: dict[str, MultiModalFeatureSpec] = {}  # the media of the request that vLLM is asking for
        self._found: dict[str, HostEntry] = {}  # those of them that vLLM was told of
        self._loads: list[tuple[_Wanted, HostEntry, int]] = []
        self._ready: list[str] = []  # requests whose encoder outputs are all there

    @locked
    def about_to_ask(self, request: "Request", num_computed: int) -> bool:
        """vLLM is about to schedule a request from token `num_computed` on. False while one of its encoder outputs is
        on its way up from a tier below.
        """
        self._salt, self._asked, self._found = request.cache_salt, {}, {}
        if self._is_enabled and wants_embeddings(request, self._session.options):
            self._asked = {feature.identifier: feature for feature in request.mm_features}
        fetches = self._session.fetches
        waits = [
            fetches.wait_for_embedding(request.request_id, wanted) for wanted in self._uncomputed(request, num_computed)
        ]
        if waits and not any(waits):
            self._ready.append(request.request_id)
        return not any(waits)

    def _uncomputed(self, request: "Request", num_computed: int) -> Iterator[Wanted]:
        """Each encoder output that the request still needs."""
        if self._session.lower is None or not self._asked:
            return
        for feature in request.mm_features:
            (_, last) = feature.mm_position.extract_embeds_range()[-1]  # text behind the last frame needs none
            if last >= num_computed:
                yield self._name(feature, request.cache_salt)

    def _name(self, feature: "MultiModalFeatureSpec", salt: str | None) -> Wanted:
        """The item's encoder output."""
        key = self._session.keys.embedding(feature.modality, feature.identifier, salt)
        return key, feature.mm_position.get_num_embeds(), entry_class("embedding", feature.modality, salt)

    @locked
    def request_finished(self, request: "Request") -> None:
        self._session.fetches.forget(request.request_id)

    @locked
    def has_cache_item(self, identifier: str) -> bool:
        """Not if the entry is of another size: a client can give two pictures one UUID that looks like a hash."""
        if identifier not in self._asked:
            return False
        key, num_embeds, _ = self._name(self._asked[identifier], self._salt)
        entry = self._session.index.get(key)
        if entry is None or entry.num_tokens != num_embeds:
            return False
        self._found[identifier] = entry
        return True

    @locked
    def update_state_after_alloc(self, request: "Request", index: int) -> None:
        """This step fills the engine's encoder cache with the item: from the slab if it is there, or by the encoder."""
        session, feature = self._session, request.mm_features[index]
        if not self._is_enabled or not wants_embeddings(request, session.options):
            return
        key, num_embeds, of_class = self._name(feature, request.cache_salt)
        item = _Wanted(feature.identifier, num_embeds, request.request_id, index, of_class)
        entry = self._found.get(feature.identifier)
        if entry is not None and entry.num_tokens != num_embeds:
            entry = None
        if session.has_ec_only:  # else the KV connector has noted what each request looked up
            nbytes = session.layout.embedding_nbytes(num_embeds)
            session.looked_up(key, nbytes, num_embeds, of_class, entry is not None)
        if entry is not None:
            # What `has_cache_item` found made the scheduler skip the encoder, so it is not asked again; pinned at once.
            self._loads.append((item, entry, session.new_job(pinned=[entry])))
            session.counters.add("loaded_embeddings")
        elif feature_reason(feature, session.options.trust_client_uuids) is None and not session.index.holds(key):
            session.wanted_embeddings[key] = item

    @locked
    def build_connector_meta(self, runs_forward: bool) -> VLCacheECMetadata:
        """Jobs of the step. Without a forward the workers never see them: loads wait, the encoder will run later."""
        metadata, session = VLCacheECMetadata(), self._session
        if runs_forward:
            metadata.loads = [_job(item, loaded, job_id) for item, loaded, job_id in self._loads]
            self._loads = []
            for key, item in session.wanted_embeddings.items():
                if session.index.holds(key):
                    continue
                nbytes = session.layout.embedding_nbytes(item.num_tokens)
                entry = session.reserve(key, nbytes, item.num_tokens, item.entry_class)
                if entry is not None:
                    metadata.saves.append(_job(item, entry, session.new_job(written=entry)))
        session.wanted_embeddings.clear()
        for request_id in self._ready:  # what they waited for was used in this step, if they were admitted
            session.fetches.release(request_id)
        self._ready.clear()
        return metadata

    @locked
    def update_connector_output(self, results: JobResults) -> None:
        self._session.take_results(results)


class ECWorker:
    """Worker side."""

    def __init__(self, session: WorkerSession) -> None:
        self._session = session
        self._results = JobResults()
        self._watch = Stopwatch(torch.device(current_platform.device_type))

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
        self._watch.start()

    def save(self, identifier: str, metadata: VLCacheECMetadata) -> None:
        """The encoder has just put `identifier` into the engine's encoder cache. The first such call of a step comes
        when all media of the step are encoded.
        """
        self._watch.stop(0)
        rows = self._session.encoder_cache.get(identifier)
        self._watch.extend(len(rows) if rows is not None else 0)
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
        results.laps += (("encode", *lap) for lap in self._watch.take() if lap[0] > 0)
        return results if results else None

    def _load(self, job: EmbeddingJob) -> torch.Tensor:
        rows = self._session.slab.embedding(job.extent, job.num_tokens)
        # A copy: the entry may be evicted while the engine still uses the rows.
        return rows.to(current_platform.device_type, copy=True)


def _job(item: _Wanted, entry: HostEntry, job_id: int) -> EmbeddingJob:
    return EmbeddingJob(job_id, item.identifier, item.num_tokens, entry.extent, item.request_id, item.index)
