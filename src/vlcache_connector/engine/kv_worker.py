"""Worker side of the KV connector: carries out the jobs of a step. It moves and computes, it never decides.

`start_load` runs before the forward of the step, `finish_step` after it. Every job is answered in its own step. An
error ends as a failed job, never as an exception in the engine's hook.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vlcache_connector.engine.attention import AttentionContexts
from vlcache_connector.engine.live import find_model
from vlcache_connector.engine.metadata import CompileJob, EmbeddingJob, JobResults, ReuseJob, SaveJob, VLCacheMetadata
from vlcache_connector.engine.models import family_of
from vlcache_connector.engine.session import WorkerSession
from vlcache_connector.exec.batch import PassLimits
from vlcache_connector.exec.model import LayerStack, Prompt
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.exec.recompute import Recompute, SequenceInput
from vlcache_connector.exec.rope import position_delta
from vlcache_connector.exec.transfer import load_runs, save_run
from vlcache_connector.types import Run

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(f"vllm.{__name__}")


class VLCacheWorker:
    """One per worker process. Raises `UnsupportedModelError` when the live model cannot be driven."""

    def __init__(self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", session: WorkerSession) -> None:
        group = kv_cache_config.kv_cache_groups[0]
        self._vllm_config = vllm_config
        self._session = session
        self._spec: Any = group.kv_cache_spec
        self._layer_names = tuple(group.layer_names)
        assert session.slab.layout.num_layers == len(self._layer_names), "the slab has another layout than the pages"
        family = family_of(vllm_config.model_config.architectures)
        assert family is not None
        self._stack: LayerStack = family.attach(find_model(vllm_config, self._layer_names[0]))
        self._pages: Pages | None = None
        self._recompute: Recompute | None = None
        self._results = JobResults()
        self._failed_blocks: set[int] = set()

    def register_pages(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Called once, when the engine has allocated its pages."""
        layers = self._vllm_config.compilation_config.static_forward_context
        paged = [_paged_layer(name, kv_caches[name], layers[name]) for name in self._layer_names]
        self._pages = Pages(paged, self._spec.block_size, self._spec.num_kv_heads, self._spec.head_size)
        device = self._pages.device
        contexts = AttentionContexts(
            self._vllm_config, self._spec, self._layer_names, self._pages, self._session.options.attention
        )
        limits = self._vllm_config.scheduler_config
        self._recompute = Recompute(
            self._stack,
            contexts,
            self._spec.block_size,
            PassLimits(limits.max_num_batched_tokens, limits.max_num_seqs),
            device,
        )

    # -- a step -------------------------------------------------------------------------------------------------------

    def start_load(self, metadata: VLCacheMetadata) -> None:
        """Reuse jobs: load entries into pages, then recompute. All jobs of the step share the passes."""
        self._failed_blocks |= metadata.lost_blocks
        if not metadata.reuse:
            return
        sequences = [self._load(job) for job in metadata.reuse]
        try:
            self._run_passes([sequence for sequence in sequences if sequence is not None])
        except Exception as error:
            logger.exception("VLCache: the recompute pass failed")
            for job in metadata.reuse:
                self._fail(job, f"recompute pass: {error}")
        for job in metadata.reuse:
            if job.job_id not in self._results.failed:
                self._succeed(job.job_id)

    def finish_step(self, metadata: VLCacheMetadata) -> None:
        """Saves of what the forward completed, and idle work."""
        failed = {job.request_id for job in metadata.reuse if job.job_id in self._results.failed}
        for save in metadata.saves:
            if save.request_id in failed:  # the forward computed this span on top of pages that were never filled
                self._results.failed[save.job_id] = "the reuse before it failed"
            else:
                self._try("save", save.job_id, lambda save=save: self._save(save))
        for embedding in metadata.embeddings:
            self._try("save", embedding.job_id, lambda embedding=embedding: self._save_embedding(embedding))
        for job in metadata.compiles:
            self._try("compile", job.job_id, lambda job=job: self._compile(job))

    def take_results(self) -> JobResults | None:
        results, self._results = self._results, JobResults()
        return results if results.succeeded or results.failed else None

    def take_failed_blocks(self) -> set[int]:
        blocks, self._failed_blocks = self._failed_blocks, set()
        return blocks

    # -- reuse --------------------------------------------------------------------------------------------------------

    def _load(self, job: ReuseJob) -> SequenceInput | None:
        """Move a job's reused tokens into its pages; returns what its part of the pass needs.

        A job that fails here still takes part in the pass where it can: all ranks of a tensor-parallel group must run
        the same passes.
        """
        assert self._pages is not None
        session = self._session
        try:
            positions = self._stack.positions(job.prompt)
            embeddings = [(s.offset, session.slab.embedding(s.embedding, s.length)) for s in job.spans]
        except Exception as error:
            logger.exception("VLCache: request %s could not be prepared", job.request_id)
            self._fail(job, f"preparation: {error}")
            return None
        try:
            for span in job.spans:
                stored = session.slab.positions(span.kv, span.length)
                delta = position_delta(stored, positions[:, span.offset : span.offset + span.length])
                entry = session.slab.kv(span.kv, span.length)
                nbytes = load_runs(self._pages, self._stack.rope, entry, span.offset, delta, span.reused, job.block_ids)
                session.counters.add("loaded_bytes", nbytes)
        except Exception as error:
            logger.exception("VLCache: request %s could not be loaded", job.request_id)
            self._fail(job, f"load: {error}")
        return _sequence(job.prompt, positions, job.block_ids, job.recomputed, embeddings)

    def _run_passes(self, sequences: list[SequenceInput]) -> None:
        assert self._recompute is not None
        self._session.counters.add("passes", self._recompute.run(sequences))

    # -- saves --------------------------------------------------------------------------------------------------------

    def _save(self, job: SaveJob) -> None:
        positions = self._stack.positions(job.prompt)
        self._store(job.run, job.block_ids, positions, job)

    def _store(self, run: Run, block_ids: tuple[int, ...], positions: torch.Tensor, job: SaveJob | CompileJob) -> None:
        assert self._pages is not None
        slab, counters = self._session.slab, self._session.counters
        slab.positions(job.kv, len(run)).copy_(positions[:, run.start : run.end])
        counters.add("saved_bytes", save_run(self._pages, slab.kv(job.kv, len(run)), run, block_ids), label="kv")
        counters.add("saved_entries", label="kv")

    def _save_embedding(self, job: EmbeddingJob) -> None:
        save_embedding(self._session, job)

    def _compile(self, job: CompileJob) -> None:
        positions = self._stack.positions(job.prompt)
        embedding = self._session.slab.embedding(job.embedding, len(job.run))
        everything = (Run(0, job.run.end),)
        sequence = _sequence(job.prompt, positions, job.block_ids, everything, [(job.run.start, embedding)])
        self._run_passes([sequence])
        self._store(job.run, job.block_ids, positions, job)
        self._session.counters.add("compiled_entries")

    # -- answers ------------------------------------------------------------------------------------------------------

    def _try(self, stage: str, job_id: int, work: Any) -> None:
        try:
            work()
        except Exception as error:
            logger.exception("VLCache: a %s failed; the image will simply not be found", stage)
            self._session.counters.add("failures", label=stage)
            self._results.failed[job_id] = f"{stage}: {error}"
        else:
            self._succeed(job_id)

    def _succeed(self, job_id: int) -> None:
        self._results.succeeded[job_id] = 1

    def _fail(self, job: ReuseJob, why: str) -> None:
        self._results.failed.setdefault(job.job_id, why)
        self._failed_blocks.update(job.owned_blocks)


def save_embedding(session: WorkerSession, job: EmbeddingJob) -> None:
    """Copy one encoder output from the engine's encoder cache into the slab. Raises `KeyError` when it is not there."""
    rows = session.encoder_cache[job.identifier]
    target = session.slab.embedding(job.extent, job.num_tokens)
    if rows.shape != target.shape:
        raise ValueError(f"encoder output has shape {tuple(rows.shape)}, expected {tuple(target.shape)}")
    target.copy_(rows)
    session.counters.add("saved_bytes", target.numel() * target.element_size(), label="embedding")
    session.counters.add("saved_entries", label="embedding")


def answer_all_failed(metadata: VLCacheMetadata, why: str) -> tuple[JobResults, set[int]]:
    """Results and invalid blocks of a step of which no job was tried."""
    jobs: Iterable[Any] = (*metadata.reuse, *metadata.saves, *metadata.embeddings, *metadata.compiles)
    blocks = {block for job in metadata.reuse for block in job.owned_blocks} | metadata.lost_blocks
    return JobResults(failed={job.job_id: why for job in jobs}, unsupported=why), blocks


def _paged_layer(name: str, cache: torch.Tensor, attention: Any) -> PagedLayer:
    def update(keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
        attention.impl.do_kv_cache_update(attention, keys, values, pages, slots)

    return PagedLayer(name, cache, update)


def _sequence(
    prompt: Prompt,
    positions: torch.Tensor,
    block_ids: tuple[int, ...],
    runs: tuple[Run, ...],
    embeddings: list[tuple[int, torch.Tensor]],
) -> SequenceInput:
    token_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
    return SequenceInput(token_ids, positions, block_ids, runs, embeddings)
