"""The spans of one recompute pass that it has to look at as a whole: those whose reused tokens it loads on the way, and
those of which it goes on with fewer tokens.

An error ends one of them, not the pass: other ranks are in it, too.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from vlcache_connector.exec.batch import VirtualBatch
from vlcache_connector.exec.narrow import Scores, rows_within
from vlcache_connector.exec.sequence import SequenceInput
from vlcache_connector.exec.shift import SpanShift
from vlcache_connector.exec.stored import Comparison, StoredSpan
from vlcache_connector.types import Run

Looked = Mapping[tuple[int, Run], torch.Tensor]
"""By request and span: how much the question looks at each token of the span, fp32 [tokens]."""


class PassSpans:
    """Hears from the pass what its layers do. `looked`: of spans whose tokens were looked at before."""

    def __init__(self, batch: VirtualBatch, sequences: Sequence[SequenceInput], looked: Looked) -> None:
        present = dict.fromkeys((row.request, row.whole) for row in batch.rows if row.whole is not None)
        runs = [(request, sequences[request].whole[number]) for request, number in present]
        self.narrowed = {
            request: found
            for request, sequence in enumerate(sequences)
            if (found := [span for span in sequence.narrowed if (request, span.run) in runs])
        }
        self._sequences, self._looked = sequences, looked
        self._shifts: list[tuple[int, SpanShift]] = []
        self._fresh: tuple[int, torch.Tensor, torch.Tensor] | None = None
        compared = (sequences[request] for request in self.narrowed)
        self._keeps_fresh = any(sequence.compared and sequence.question is None for sequence in compared)
        for request, run in runs:
            span = sequences[request].shifted.get(run)
            if span is not None and not span.is_begun:
                span.is_begun = True
                _attempt(span, partial(self._begin, request, span))
        self.take(batch)

    def _begin(self, request: int, span: StoredSpan) -> None:
        sequence = self._sequences[request]
        self._shifts.append((request, SpanShift(span, sequence.positions, sequence.block_ids)))

    @property
    def borders(self) -> list[int]:
        """Layers before which the pass becomes smaller."""
        narrowed = (span for spans in self.narrowed.values() for span in spans)
        return sorted({narrowing.layer for span in narrowed for narrowing in span.narrowings})

    @property
    def listens(self) -> bool:
        """Whether anything wants to hear of fresh KV."""
        return bool(self._shifts) or self._keeps_fresh

    def take(self, batch: VirtualBatch) -> None:
        """From here on the pass is this."""
        self._batch = batch
        for request, shift in self._shifts:
            rows = rows_within(batch, request, shift.span.run)
            _attempt(shift.span, partial(shift.take, rows, batch.positions[rows]))

    def on_fresh_kv(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._keeps_fresh:
            self._fresh = layer, keys, values
        for _, shift in self._shifts:
            _attempt(shift.span, partial(shift.apply, layer, keys, values))

    def load_without_samples(self, layer: int) -> None:
        """No token of the pass is recomputed in this layer any more."""
        for _, shift in self._shifts:
            none = shift.span.entry[layer, :, :0].to(shift.span.pages.device)
            _attempt(shift.span, partial(shift.apply, layer, *none))

    def finish(self, num_layers: int) -> None:
        for _, shift in self._shifts:
            if shift.span.error is None and shift.span.layers_loaded != num_layers:
                missing = "the attention layers did not show their fresh KV; reused tokens are missing"
                shift.span.error = RuntimeError(missing)

    def scores(self, request: int, run: Run) -> Scores | None:
        """What this rank's heads know of a span whose tokens the pass chooses from; None where it cannot say."""
        looked, span = self._looked.get((request, run)), self._sequences[request].compared.get(run)
        if looked is not None:
            return lambda tokens: looked[tokens - run.start]
        if span is None or span.error is not None or self._fresh is None:
            return None
        return partial(self._deviation, request, span)

    def _deviation(self, request: int, span: StoredSpan, tokens: torch.Tensor) -> torch.Tensor:
        assert self._fresh is not None
        layer, keys, values = self._fresh
        found = torch.zeros(len(tokens), device=keys.device)

        def compare() -> None:
            rows = rows_within(self._batch, request, span.run)
            comparison = Comparison(span, self._sequences[request].positions, rows, tokens)
            changes = comparison.changes(span.entry[layer].to(keys.device), keys, values)
            torch.sum(changes.square(), dim=(1, 2, 3), out=found)

        _attempt(span, compare)
        return found


def _attempt(span: StoredSpan, work: Callable[[], None]) -> None:
    if span.error is None:
        try:
            work()
        except Exception as error:
            span.error = error
