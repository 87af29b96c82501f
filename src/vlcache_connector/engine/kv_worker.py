"""Worker side of the KV connector: carries out the jobs of a step. It moves and computes, it never decides.

`run_step` runs after the forward of the step, or in place of it when there is none. An error ends as a failed job,
never as an exception in the engine's hook.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger

from vlcache_connector.engine import debug
from vlcache_connector.engine.answers import StepAnswers
from vlcache_connector.engine.attention import AttentionContexts
from vlcache_connector.engine.live import find_model, positions_buffer
from vlcache_connector.engine.metadata import (
    AuditJob,
    CompileJob,
    EmbeddingJob,
    JobResults,
    ReusePiece,
    SaveJob,
    VLCacheMetadata,
)
from vlcache_connector.engine.models import family_of
from vlcache_connector.engine.piece_loader import PieceLoader, encoder_output, shifts
from vlcache_connector.engine.session import WorkerSession
from vlcache_connector.exec.audit import audit
from vlcache_connector.exec.batch import PassLimits
from vlcache_connector.exec.content import order_of
from vlcache_connector.exec.late import Late
from vlcache_connector.exec.model import LayerStack
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.exec.recompute import Recompute
from vlcache_connector.exec.sequence import SequenceInput
from vlcache_connector.exec.stopwatch import Stopwatch
from vlcache_connector.exec.transfer import save_run
from vlcache_connector.plan.costs import MIN_TOKENS
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
        model = find_model(vllm_config, self._layer_names[0])
        self._stack: LayerStack = family.attach(model, positions_buffer())
        self._pages: Pages | None = None
        self._recompute: Recompute | None = None
        self._loader: PieceLoader | None = None
        self._errors: dict[str, str] = {}  # of requests that have had a piece, but not the last, when a piece failed
        self._watches: dict[str, Stopwatch] = {}
        self._late = JobResults()  # of this step
        self.answers = StepAnswers()

    def register_pages(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Called once, when the engine has allocated its pages."""
        layers = self._vllm_config.compilation_config.static_forward_context
        paged = [_paged_layer(name, kv_caches[name], layers[name]) for name in self._layer_names]
        self._pages = Pages(paged, self._spec.block_size, self._spec.num_kv_heads, self._spec.head_size)
        self._loader = PieceLoader(self._pages, self._stack, self._session)
        device = self._pages.device
        self._watches = {kind: Stopwatch(device) for kind in ("compute", "load", "recompute")}
        self._session.late = Late(device)
        contexts = AttentionContexts(
            self._vllm_config, self._spec, self._layer_names, self._pages, self._session.options.attention
        )
        max_tokens = self._vllm_config.scheduler_config.max_num_batched_tokens
        self._recompute = Recompute(
            self._stack,
            contexts,
            self._spec.block_size,
            PassLimits(max_tokens, contexts.max_rows),
            device,
            tensor_model_parallel_all_reduce,
        )

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Just before the forward."""
        if self._watches:
            self._watches["compute"].start()

    def end_forward(self, metadata: VLCacheMetadata) -> None:
        """Just behind the forward, where the model runner says so: the V2 runner samples before the step goes on."""
        if self._watches:
            self._watches["compute"].stop(metadata.num_computed_tokens)

    def run_step(self, metadata: VLCacheMetadata) -> None:
        """Saves of what the forward completed, pieces of reuse, idle work."""
        self.end_forward(metadata)
        debug.launching(metadata)
        for save in metadata.saves:
            self._try("save", save.job_id, partial(self._save, save), self._late)
        for embedding in metadata.embeddings:
            self._try("save", embedding.job_id, partial(save_embedding, self._session, embedding), self._late)
        if metadata.reuse:
            self._reuse(metadata.reuse)
        for job in metadata.compiles:
            self._try("compile", job.job_id, partial(self._compile, job), self._late)
        for checked in metadata.audits:
            self._try("audit", checked.job_id, partial(self._audit, checked), self.answers.results)
        for kind, watch in self._watches.items():
            self.answers.results.laps += ((kind, *lap) for lap in watch.take() if lap[0] >= MIN_TOKENS)

    def take_answers(self) -> StepAnswers:
        answers, self.answers = self.answers, StepAnswers()
        late, self._late = self._late or None, JobResults()
        if self._session.late is not None:
            late = self._session.late.exchange(late)
        if late is not None:
            answers.results.merge(late)
        return answers

    # -- reuse --------------------------------------------------------------------------------------------------------

    def _reuse(self, pieces: Sequence[ReusePiece]) -> None:
        """Load, then recompute; all pieces of the step share the passes.

        A piece that fails still takes part in the passes: all ranks of a tensor-parallel group must run the same ones.
        """
        self._watches["load"].start()
        sequences = [self._load(piece) for piece in pieces]
        loaded = [span for piece in pieces for span in piece.spans if not shifts(piece, span)]
        self._watches["load"].stop(sum(len(run) for span in loaded for run in span.reused))
        try:
            self._watches["recompute"].start()
            self._run_passes(sequences)
            self._watches["recompute"].stop(sum(piece.num_recomputed for piece in pieces))
        except Exception as error:
            logger.exception("VLCache: the recompute pass failed")
            for piece in pieces:
                self._errors.setdefault(piece.request_id, f"recompute pass: {error}")
        for piece, sequence in zip(pieces, sequences, strict=True):
            for span in sequence.stored:
                if span.error is not None:
                    logger.error("VLCache: request %s could not be loaded", piece.request_id, exc_info=span.error)
                    self._errors.setdefault(piece.request_id, f"load: {span.error}")
            loaded_bytes = sum(span.nbytes for span in sequence.shifted.values() if span.error is None)
            self._session.counters.add("loaded_bytes", loaded_bytes)
        for piece in pieces:
            if piece.is_last:
                self._answer(piece)

    def _load(self, piece: ReusePiece) -> SequenceInput:
        assert self._loader is not None
        sequence, error = self._loader.load(piece)
        if error is not None:
            self._errors.setdefault(piece.request_id, error)
        return sequence

    def _answer(self, piece: ReusePiece) -> None:
        assert self._loader is not None
        request_id = piece.request_id
        self._loader.forget(request_id)
        error = self._errors.pop(request_id, None)
        self.answers.finished.add(request_id)
        self._late.released[piece.job_id] = 1
        if error is None:
            self.answers.results.succeeded[piece.job_id] = 1
        else:
            self.answers.failed.add(request_id)
            self.answers.results.failed[piece.job_id] = error

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
        kv = slab.kv(job.kv, len(run))
        counters.add("saved_bytes", save_run(self._pages, kv, run, block_ids), label="kv")
        slab.order(job.kv, len(run)).copy_(order_of(kv, self._pages.device), non_blocking=True)
        counters.add("saved_entries", label="kv")

    def _compile(self, job: CompileJob) -> None:
        positions = self._stack.positions(job.prompt)
        embedding = encoder_output(self._session.slab, job.prompt, job.run.start, job.embedding)
        token_ids = torch.tensor(job.prompt.token_ids, dtype=torch.int64)
        everything = (Run(0, job.run.end),)
        self._run_passes([SequenceInput(token_ids, positions, job.block_ids, everything, [embedding])])
        self._store(job.run, job.block_ids, positions, job)
        self._session.counters.add("compiled_entries")

    def _audit(self, job: AuditJob) -> None:
        """An error on the way to the passes is raised behind them: all ranks of a group must run the same ones."""
        assert self._pages is not None and self._recompute is not None and self._loader is not None
        piece, slab = job.piece, self._session.slab
        sequence = self._load(piece)
        others = [encoder_output(slab, piece.prompt, offset, extent) for offset, extent in job.embeddings]
        sequence = replace(sequence, embeddings=[*sequence.embeddings, *others])
        try:
            reused = [run for span in piece.spans for run in span.reused]
            drift = audit(self._recompute, self._pages, sequence, reused)
        finally:
            self._loader.forget(piece.request_id)
            error = self._errors.pop(piece.request_id, None)
        errors = [error, *(span.error for span in sequence.stored)]
        if any(errors):
            raise RuntimeError(f"the reuse could not be repeated: {next(filter(None, errors))}")
        self.answers.results.drifts[job.job_id] = drift

    # -- answers ------------------------------------------------------------------------------------------------------

    def _try(self, stage: str, job_id: int, work: Callable[[], None], results: JobResults) -> None:
        try:
            work()
        except Exception as error:
            logger.exception("VLCache: job failed (%s); requests go on without its result", stage)
            self._session.counters.add("failures", label=stage)
            results.failed[job_id] = f"{stage}: {error}"
        else:
            results.succeeded[job_id] = 1


def save_embedding(session: WorkerSession, job: EmbeddingJob) -> None:
    """Copy one encoder output from the engine's encoder cache into the slab. Raises `KeyError` when it is not there."""
    rows = session.encoder_cache[job.identifier]
    target = session.slab.embedding(job.extent, job.num_tokens)
    if rows.shape != target.shape:
        raise ValueError(f"encoder output has shape {tuple(rows.shape)}, expected {tuple(target.shape)}")
    target.copy_(rows)
    session.counters.add("saved_bytes", target.numel() * target.element_size(), label="embedding")
    session.counters.add("saved_entries", label="embedding")


def _paged_layer(name: str, cache: torch.Tensor, attention: Any) -> PagedLayer:
    def update(keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
        attention.impl.do_kv_cache_update(attention, keys, values, pages, slots)

    return PagedLayer(name, cache, update)
