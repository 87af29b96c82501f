"""The recompute pass: tokens that are not reused run through the model's own layers as virtual sequences.

Fresh KV overwrites the pages. Nothing is sampled: the engine's forward, which comes after, computes the rest of the
prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby

import torch

from vlcache_connector.exec.batch import PassLimits, Row, VirtualBatch, build_batch, positions_of, split_passes
from vlcache_connector.exec.model import LayerStack
from vlcache_connector.exec.shift import ShiftedSpan, SpanShift
from vlcache_connector.types import Run

FreshKV = Callable[[int, torch.Tensor, torch.Tensor], None]
"""(layer, keys [rows, heads, dim], values) -> None: called when a layer has written its KV, before attention reads."""
AttentionContext = Callable[[VirtualBatch, FreshKV | None], AbstractContextManager[None]]
"""Makes the engine's attention layers see a virtual batch while the context is open."""


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One request's part of a pass."""

    token_ids: torch.Tensor  # [tokens] int64, on the CPU
    positions: torch.Tensor  # [3, tokens] int64, on the CPU
    block_ids: Sequence[int]
    runs: Sequence[Run]  # what to compute, in order
    embeddings: Sequence[tuple[int, torch.Tensor]]  # (offset of a span, its encoder output [length, width])
    whole: Sequence[Run] = ()  # whose runs stay in one pass where possible
    shifted: Mapping[Run, ShiftedSpan] = field(default_factory=dict)  # those of `whole` that are loaded on the way

    def rows(self, number: int) -> Iterator[Row]:
        """The runs, as request `number` of a pass, cut at the borders of what stays whole. On all ranks the same, also
        where a span could not be loaded: they must run the same passes.
        """
        for run in self.runs:
            start = run.start
            for i, whole in enumerate(self.whole):
                inside = run.intersect(whole)
                if not len(inside):
                    continue
                if start < inside.start:
                    yield Row(number, Run(start, inside.start))
                yield Row(number, inside, whole=i)
                start = inside.end
            if start < run.end:
                yield Row(number, Run(start, run.end))


class Recompute:
    """Runs recompute passes on one rank."""

    def __init__(
        self, stack: LayerStack, context: AttentionContext, block_size: int, limits: PassLimits, device: torch.device
    ) -> None:
        self._stack = stack
        self._context = context
        self._block_size = block_size
        self._limits = limits
        self._device = device

    def run(self, sequences: Sequence[SequenceInput]) -> int:
        """Compute all runs of all sequences; returns the number of passes that took. What goes wrong with a shifted
        span is left in its `error`.
        """
        rows = [row for i, sequence in enumerate(sequences) for row in sequence.rows(i)]
        num_passes = 0
        for part in split_passes(rows, self._limits):
            self._run_pass(part, sequences)
            num_passes += 1
        return num_passes

    def last_logits(self, sequence: SequenceInput) -> torch.Tensor | None:
        """Compute all runs of a sequence; returns the logits [vocabulary] of its last token, as `LayerStack.logits`
        does. Errors of shifted spans as in `run`.
        """
        *parts, last = split_passes(sequence.rows(0), self._limits)
        for part in parts:
            self._run_pass(part, [sequence])
        hidden, residual = self._run_pass(last, [sequence])
        logits = self._stack.logits(hidden[-1:], residual[-1:] if residual is not None else None)
        return logits[0] if logits is not None else None

    def _run_pass(
        self, rows: Sequence[Row], sequences: Sequence[SequenceInput]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what the last layer gave."""
        batch = build_batch(rows, [s.block_ids for s in sequences], self._block_size, self._device)
        shifts = _begin_shifts(batch, sequences)
        hidden, added = self._inputs(batch, sequences)
        positions = torch.cat([s.positions[:, at] for s, at in _tokens(batch, sequences)], dim=1).to(self._device)
        residual: torch.Tensor | None = None
        with self._context(batch, _each(shifts) if shifts else None):
            for layer in range(self._stack.num_layers):
                hidden, residual = self._stack.run_layer(layer, positions, hidden, residual)
                if layer < len(added):
                    hidden = hidden + added[layer]
        for span, _ in shifts:
            if span.error is None and span.layers_loaded != self._stack.num_layers:
                span.error = RuntimeError("the attention layers did not show their fresh KV; reused tokens are missing")
        return hidden, residual

    def _inputs(
        self, batch: VirtualBatch, sequences: Sequence[SequenceInput]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Input rows [n, hidden] of a pass, and the rows to add after the first layers (zero for text)."""
        ids = torch.cat([s.token_ids[at] for s, at in _tokens(batch, sequences)])
        hidden = self._stack.embed(ids.to(self._device))
        added: list[torch.Tensor] = []
        for number in batch.requests.unique().tolist():
            for offset, embedding in sequences[number].embeddings:
                where = _rows_within(batch, number, Run(offset, offset + len(embedding)))
                if not len(where):
                    continue
                pieces = self._stack.split_embedding(embedding[batch.positions[where] - offset].to(self._device))
                where = where.to(self._device)
                hidden[where] = pieces[0].to(hidden.dtype)
                if len(pieces) > 1 and not added:
                    added = [torch.zeros_like(hidden) for _ in pieces[1:]]
                for target, piece in zip(added, pieces[1:], strict=True):
                    target[where] = piece.to(hidden.dtype)
        return hidden, added


def _tokens(batch: VirtualBatch, sequences: Sequence[SequenceInput]) -> Iterator[tuple[SequenceInput, torch.Tensor]]:
    """The pass in parts of one request each, with positions."""
    for number, rows in groupby(batch.rows, key=lambda row: row.request):
        yield sequences[number], positions_of([row.run for row in rows])


def _rows_within(batch: VirtualBatch, request: int, run: Run) -> torch.Tensor:
    """Where in a pass the tokens of a run of a request are: int64."""
    inside = (batch.requests == request) & (batch.positions >= run.start) & (batch.positions < run.end)
    return inside.nonzero()[:, 0]


def _begin_shifts(batch: VirtualBatch, sequences: Sequence[SequenceInput]) -> list[tuple[ShiftedSpan, SpanShift]]:
    """Shifted spans whose first samples are in this pass."""
    begun = []
    for request, number in dict.fromkeys((row.request, row.whole) for row in batch.rows if row.whole is not None):
        sequence = sequences[request]
        span = sequence.shifted.get(sequence.whole[number])
        if span is None or span.is_begun:
            continue
        span.is_begun = True
        try:
            rows = _rows_within(batch, request, span.run)
            tokens = batch.positions[rows]
            begun.append((span, SpanShift(span, sequence.positions, sequence.block_ids, rows, tokens)))
        except Exception as error:
            span.error = error
    return begun


def _each(shifts: Sequence[tuple[ShiftedSpan, SpanShift]]) -> FreshKV:
    """All shifts of a pass. An error ends one of them, not the pass: other ranks are in it, too."""

    def apply(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for span, shift in shifts:
            if span.error is None:
                try:
                    shift.apply(layer, keys, values)
                except Exception as error:
                    span.error = error

    return apply
