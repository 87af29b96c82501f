"""A reuse job once more, alone, in scratch pages: what an idle engine would have computed from the same entries.

The live job may have run in several pieces over several steps, in passes that it shared with other requests, beside
forwards, aborts and faults. Here it runs at once, and the rest of its prompt behind it, which gives the first token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from soak.rows import read_rows, write_rows
from vlcache_connector.engine.attention import AttentionContexts
from vlcache_connector.engine.kv_worker import VLCacheWorker, _paged_layer
from vlcache_connector.engine.metadata import SpanLoad
from vlcache_connector.engine.piece_loader import encoder_output
from vlcache_connector.exec.batch import PassLimits
from vlcache_connector.exec.model import Prompt
from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.recompute import Recompute
from vlcache_connector.exec.rope import position_delta
from vlcache_connector.exec.sequence import EncoderOutput, SequenceInput
from vlcache_connector.exec.stored import StoredSpan
from vlcache_connector.exec.transfer import load_runs
from vlcache_connector.types import Run

NUM_TOP = 20


@dataclass(frozen=True)
class Job:
    """All pieces of one reuse job as one."""

    prompt: Prompt
    block_ids: tuple[int, ...]
    start: int  # before it, rows are taken over from the live pages
    spans: tuple[SpanLoad, ...]  # each with its reused runs of all pieces
    recomputed: tuple[Run, ...]
    shifts: bool

    def is_shifted(self, span: SpanLoad) -> bool:
        """Whether the span's reused rows move by what its recomputed ones show."""
        return self.shifts and bool(span.reused) and any(len(run.intersect(span.run)) for run in self.recomputed)

    @property
    def end(self) -> int:
        return max((run.end for run in (*self.recomputed, *(r for s in self.spans for r in s.reused))), default=0)


class Replay:
    """Scratch pages beside those of one worker, of at most `num_tokens` tokens."""

    def __init__(self, worker: VLCacheWorker, num_tokens: int) -> None:
        assert worker._pages is not None
        self._worker = worker
        config, spec = worker._vllm_config, worker._spec
        layers = config.compilation_config.static_forward_context
        self._layers: list[Any] = [layers[name] for name in worker._layer_names]
        num_blocks = 1 - (-num_tokens // spec.block_size)
        self._caches = [torch.zeros(num_blocks, *c.shape[1:], dtype=c.dtype) for c in worker._pages.caches]
        named = zip(worker._layer_names, self._caches, self._layers, strict=True)
        paged = [_paged_layer(name, cache, layer) for name, cache, layer in named]
        self._pages = Pages(paged, spec.block_size, spec.num_kv_heads, spec.head_size)
        self._blocks = tuple(range(1, num_blocks))
        contexts = AttentionContexts(config, spec, worker._layer_names, self._pages, worker._session.options.attention)
        limits = PassLimits(config.scheduler_config.max_num_batched_tokens, contexts.max_rows)
        self._pass = Recompute(worker._stack, contexts, spec.block_size, limits, self._pages.device)

    def rows(self, job: Job, max_run: int | None = None) -> torch.Tensor:
        """Rows [layers, 2, tokens, ...] from `job.start` to its end; with `max_run`, in passes of so few tokens,
        which is not for jobs that shift.
        """
        live, slab, stack = self._worker._pages, self._worker._session.slab, self._worker._stack
        assert live is not None
        if job.start:
            before = Run(0, job.start)
            write_rows(self._pages, self._blocks, before, read_rows(live, job.block_ids, before))
        positions = stack.positions(job.prompt)
        shifted: dict[Run, StoredSpan] = {}
        for span in job.spans:
            wanted = positions[:, span.offset : span.offset + span.length]
            delta = position_delta(slab.positions(span.kv, span.length), wanted)
            entry = slab.kv(span.kv, span.length)
            if job.is_shifted(span):
                shifted[span.run] = StoredSpan(self._pages, stack.rope, span.offset, entry, delta, span.reused)
            else:
                load_runs(self._pages, stack.rope, entry, span.offset, delta, span.reused, self._blocks)
        embeddings = [encoder_output(slab, job.prompt, span.offset, span.embedding) for span in job.spans]
        for runs in [job.recomputed] if max_run is None else [(run,) for run in _cut(job.recomputed, max_run)]:
            with self._in_place():
                self._pass.run([self._sequence(job.prompt, positions, runs, embeddings, shifted)])
        errors = [span.error for span in shifted.values() if span.error is not None]
        assert not errors, errors
        return read_rows(self._pages, self._blocks, Run(job.start, job.end))

    def first_token(
        self,
        prompt: Prompt,
        covered: int,
        block_ids: Sequence[int] | None = None,
        embeddings: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> list[tuple[int, float]]:
        """The likeliest first tokens behind a prompt of which `covered` tokens are in place: in the scratch pages, or
        in the live blocks `block_ids`; the rest is text, and images with these encoder outputs by offset.
        """
        if block_ids is not None:
            assert self._worker._pages is not None
            before = Run(0, covered)
            write_rows(self._pages, self._blocks, before, read_rows(self._worker._pages, block_ids, before))
        positions = self._worker._stack.positions(prompt)
        outputs = [EncoderOutput((Run(offset, offset + len(rows)),), rows) for offset, rows in embeddings]
        sequence = self._sequence(prompt, positions, (Run(covered, len(prompt.token_ids)),), outputs)
        with self._in_place():
            logits = self._pass.last_logits(sequence)
        assert logits is not None
        top = logits.float().log_softmax(-1).topk(NUM_TOP)
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def _sequence(
        self,
        prompt: Prompt,
        positions: torch.Tensor,
        runs: Sequence[Run],
        embeddings: list[EncoderOutput],
        shifted: Mapping[Run, StoredSpan] | None = None,
    ) -> SequenceInput:
        token_ids, spans = torch.tensor(prompt.token_ids, dtype=torch.int64), shifted or {}
        return SequenceInput(token_ids, positions, self._blocks, runs, embeddings, whole=tuple(spans), shifted=spans)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The attention layers see the scratch pages."""
        live = [layer.kv_cache for layer in self._layers]
        try:
            for layer, cache in zip(self._layers, self._caches, strict=True):
                layer.kv_cache = cache
            yield
        finally:
            for layer, cache in zip(self._layers, live, strict=True):
                layer.kv_cache = cache


def _cut(runs: Sequence[Run], most: int) -> Iterator[Run]:
    for run in runs:
        for start in range(run.start, run.end, most):
            yield Run(start, min(start + most, run.end))
