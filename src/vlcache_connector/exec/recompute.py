"""The recompute pass: tokens that are not reused run through the model's own layers as virtual sequences.

Fresh KV overwrites the pages. Nothing is sampled: the engine's forward, which comes after, computes the rest of the
prompt.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from vlcache_connector.exec.batch import PassLimits, Row, VirtualBatch, build_batch, split_passes
from vlcache_connector.exec.model import LayerStack, run_layers
from vlcache_connector.exec.narrow import Total, kept_at
from vlcache_connector.exec.question import Look, rows_of
from vlcache_connector.exec.sequence import SequenceInput, parts_of
from vlcache_connector.exec.spans import Looked, PassSpans

FreshKV = Callable[[int, torch.Tensor, torch.Tensor], None]
"""(layer, keys [rows, heads, dim], values) -> None: called when a layer has written its KV, before attention reads."""
Queries = Callable[[int, torch.Tensor], None]
"""(layer, queries [rows, heads, dim]) -> None: called before a layer's attention."""
AttentionContext = Callable[
    [VirtualBatch, FreshKV | None, Queries | None, int | None], AbstractContextManager[None, bool | None]
]
"""Makes the engine's attention layers see a virtual batch while the context is open. The last argument is a layer of
which only KV and queries are needed: the context ends within it, once they are there, where the engine allows that.
"""


class Recompute:
    """Runs recompute passes on one rank. `total` sums over all of them."""

    def __init__(
        self,
        stack: LayerStack,
        context: AttentionContext,
        block_size: int,
        limits: PassLimits,
        device: torch.device,
        total: Total = lambda rows: rows,
    ) -> None:
        self._stack = stack
        self._context = context
        self._block_size = block_size
        self._limits = limits
        self._device = device
        self._total: Total = lambda rows: total(rows.to(device))

    def run(self, sequences: Sequence[SequenceInput]) -> int:
        """Compute all runs of all sequences; returns the number of passes that took. What goes wrong with a stored
        span is left in its `error`.
        """
        looked, num_passes = self._look(sequences)
        rows = [row for i, sequence in enumerate(sequences) for row in sequence.rows(i)]
        for part in split_passes(rows, self._limits):
            self._run_pass(part, sequences, looked)
            num_passes += 1
        return num_passes

    def last_logits(self, sequence: SequenceInput) -> torch.Tensor | None:
        """Compute all runs of a sequence; returns the logits [vocabulary] of its last token, as `LayerStack.logits`
        does. Errors of stored spans as in `run`.
        """
        looked, _ = self._look([sequence])
        *parts, last = split_passes(sequence.rows(0), self._limits)
        for part in parts:
            self._run_pass(part, [sequence], looked)
        hidden, residual = self._run_pass(last, [sequence], looked, needs_output=True)
        logits = self._stack.logits(hidden[-1:], residual[-1:] if residual is not None else None)
        return logits[0] if logits is not None else None

    def _look(self, sequences: Sequence[SequenceInput]) -> tuple[Looked, int]:
        """What questions look at, and the number of passes to know that."""
        look, num_passes = Look(sequences), 0
        for rows in split_passes(rows_of(sequences), self._limits):
            batch, positions = self._batch(rows, sequences)
            hidden, added = self._inputs(batch, sequences)
            with self._context(batch, None, partial(look.on_queries, batch), self._stack.num_layers - 1):
                self._stack.run(positions, hidden, added)
            num_passes += 1
        return look.scores, num_passes

    def _run_pass(
        self, rows: Sequence[Row], sequences: Sequence[SequenceInput], looked: Looked, needs_output: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what the last layer gave, where `needs_output` is set."""
        batch, positions = self._batch(rows, sequences)
        spans = PassSpans(batch, sequences, looked)
        hidden, added = self._inputs(batch, sequences)
        residual: torch.Tensor | None = None
        first, end = 0, self._stack.num_layers
        for border in [*spans.borders, end]:
            layers = range(first, border)
            if not batch.num_tokens:
                for layer in layers:
                    spans.load_without_samples(layer)
            elif layers:
                is_kv_enough = border == end and not needs_output
                fresh_kv = spans.on_fresh_kv if spans.listens else None
                with self._context(batch, fresh_kv, None, end - 1 if is_kv_enough else None):
                    if is_kv_enough and first == 0:
                        self._stack.run(positions, hidden, added)
                    else:
                        hidden, residual = run_layers(self._stack, layers, positions, hidden, residual, added)
            if border < end:
                keep = kept_at(border, batch, spans.narrowed, spans.scores, self._total, self._limits.max_rows)
                batch = batch.narrowed(keep)
                keep = keep.to(self._device)
                hidden, positions, added = hidden[keep], positions[:, keep], [rows[keep] for rows in added]
                residual = residual[keep] if residual is not None else None
                spans.take(batch)
            first = border
        spans.finish(end)
        return hidden, residual

    def _batch(self, rows: Sequence[Row], sequences: Sequence[SequenceInput]) -> tuple[VirtualBatch, torch.Tensor]:
        """The rows as a batch, and rope positions [3, tokens]."""
        batch = build_batch(rows, [s.block_ids for s in sequences], self._block_size, self._device)
        positions = torch.cat([s.positions[:, at] for s, at in parts_of(batch, sequences)], dim=1)
        return batch, positions.to(self._device)

    def _inputs(
        self, batch: VirtualBatch, sequences: Sequence[SequenceInput]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Input rows [n, hidden] of a pass, and the rows to add after the first layers (zero for text)."""
        ids = torch.cat([s.token_ids[at] for s, at in parts_of(batch, sequences)])
        hidden = self._stack.embed(ids.to(self._device))
        added: list[torch.Tensor] = []
        for number in batch.requests.unique().tolist():
            for output in sequences[number].embeddings:
                where, of_token = output.within(batch, number)
                if not len(where):
                    continue
                pieces = self._stack.split_embedding(output.rows.index_select(0, of_token).to(self._device))
                where = where.to(self._device)
                hidden[where] = pieces[0].to(hidden.dtype)
                if len(pieces) > 1 and not added:
                    added = [torch.zeros_like(hidden) for _ in pieces[1:]]
                for target, piece in zip(added, pieces[1:], strict=True):
                    target[where] = piece.to(hidden.dtype)
        return hidden, added
