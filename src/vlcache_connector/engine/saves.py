"""Which spans a step completes and how they become entries: saved from the pages, or computed later when the engine
is idle.

Scheduler side. Only exact KV is stored, so errors never compound over generations.
"""

from typing import TYPE_CHECKING

from vlcache_connector.engine.idle import CompileQueue
from vlcache_connector.engine.metadata import EmbeddingJob, SaveJob, VLCacheMetadata
from vlcache_connector.engine.requests import RequestState
from vlcache_connector.engine.session import SchedulerSession

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager


class SavePlanner:
    """Makes the save jobs of each step. `alone`: every entry is computed by the idle engine, behind nothing."""

    def __init__(self, session: SchedulerSession, alone: bool) -> None:
        self._session = session
        self._alone = alone
        self._kv_cache_manager: KVCacheManager | None = None
        self.compiles = CompileQueue(session, alone)

    def bind(self, kv_cache_manager: "KVCacheManager", block_size: int) -> None:
        self._kv_cache_manager = kv_cache_manager
        self.compiles.bind(kv_cache_manager.block_pool, block_size)

    def add_completed(self, state: RequestState, num_computed: int, metadata: VLCacheMetadata) -> None:
        """Deal with the spans that end within the first `num_computed` tokens, each once."""
        while state.first_unsaved < len(state.spans) and state.spans[state.first_unsaved].end <= num_computed:
            number = state.first_unsaved
            state.first_unsaved += 1
            span = state.spans[number]
            # With all its frames in vLLM's prefix cache, nobody asked for its encoder output, and it may be gone.
            is_cached = state.media[number].embedded[-1].end <= state.num_local
            if is_cached or self._session.unsupported is not None or state.declined is not None:
                continue
            if self._session.index.holds(span.kv_key):
                continue
            if state.is_approximate or self._alone:
                self._save_embedding(state, number, metadata)  # what it is computed from later
                self.compiles.add(span, state.prompt(span.end), state.entry_class("kv", span))
            elif self._save(state, number, metadata):
                self._save_embedding(state, number, metadata)

    def _save(self, state: RequestState, number: int, metadata: VLCacheMetadata) -> bool:
        """False when there is no room."""
        assert self._kv_cache_manager is not None
        session, span, request_id = self._session, state.spans[number], state.request.request_id
        (block_ids,), prompt = self._kv_cache_manager.get_block_ids(request_id), state.prompt(span.end)
        entry = session.reserve(
            span.kv_key, session.layout.kv_nbytes(span.length), span.length, state.entry_class("kv", span)
        )
        if entry is None:
            return False
        job_id = session.new_job(written=entry)
        metadata.saves.append(SaveJob(job_id, request_id, prompt, tuple(block_ids), span.run, entry.extent))
        return True

    def _save_embedding(self, state: RequestState, number: int, metadata: VLCacheMetadata) -> None:
        """Where the engine had this embedding in its own encoder cache, the encoder connector was not asked."""
        session, span = self._session, state.spans[number]
        if session.index.holds(span.embedding_key) or span.embedding_key in session.wanted_embeddings:
            return
        features = state.request.mm_features
        at = next(i for i, feature in enumerate(features) if feature.mm_position.offset == span.offset)
        nbytes = session.layout.embedding_nbytes(span.num_embedded)
        entry = session.reserve(span.embedding_key, nbytes, span.num_embedded, state.entry_class("embedding", span))
        if entry is None:
            return
        job_id = session.new_job(written=entry)
        identifier = features[at].identifier
        metadata.embeddings.append(
            EmbeddingJob(job_id, identifier, span.num_embedded, entry.extent, state.request.request_id, at)
        )
