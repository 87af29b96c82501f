"""How much the tokens of a question look at those of reused spans: attention times the norm of the value, summed over
heads, layers and tokens of the question (the score of CONDUIT).

The question runs through the layers before anything of the spans was recomputed, with all text before it. Its KV lies
where the engine will write it, or in blocks that are lent for it.
"""

from collections.abc import Sequence

import torch

from vlcache_connector.exec.batch import Row, VirtualBatch
from vlcache_connector.exec.narrow import rows_within
from vlcache_connector.exec.sequence import SequenceInput
from vlcache_connector.exec.stored import StoredSpan
from vlcache_connector.kernels.ops import shift_rows


def rows_of(sequences: Sequence[SequenceInput]) -> list[Row]:
    """What has to run: text, so that the question sees it, and the question."""
    rows = []
    for number, sequence in enumerate(sequences):
        if sequence.question is None:
            continue
        spans = {span.run for span in sequence.narrowed}
        inside = {i for i, run in enumerate(sequence.whole) if run in spans}
        text = (row for row in sequence.rows(number) if row.whole not in inside)
        rows += [row for row in text if row.run.end <= sequence.question.start]
        rows.append(Row(number, sequence.question))
    return rows


class Look:
    """Hears the queries of a pass and sums up what they look at."""

    def __init__(self, sequences: Sequence[SequenceInput]) -> None:
        self._sequences = sequences
        self.scores = {
            (number, run): torch.zeros(len(run))
            for number, sequence in enumerate(sequences)
            if sequence.question is not None
            for run in sequence.compared
        }

    def on_queries(self, batch: VirtualBatch, layer: int, queries: torch.Tensor) -> None:
        """`queries` [rows, heads, dim] of a layer."""
        for number, sequence in enumerate(self._sequences):
            spans = [span for span in sequence.compared.values() if span.error is None]
            if sequence.question is None or not spans:
                continue
            rows = rows_within(batch, number, sequence.question).to(queries.device)
            try:
                for span, seen in zip(spans, _seen(spans, sequence, layer, queries[rows]), strict=True):
                    self.scores[number, span.run] += seen.cpu()
            except Exception as error:
                for span in spans:
                    span.error = error


def _seen(
    spans: Sequence[StoredSpan], sequence: SequenceInput, layer: int, queries: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Of the tokens of each span, fp32."""
    stored = torch.cat([_moved(span, layer, sequence) for span in spans], dim=1).float()
    keys, values = stored  # [tokens, KV heads, dim]
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # [question, KV heads, query heads of each, dim]
    products = torch.einsum("qhgd,thd->qhgt", grouped, keys) / keys.shape[-1] ** 0.5
    attention = products.softmax(-1).sum((0, 2))  # [KV heads, tokens]
    seen = (attention * values.norm(dim=-1).T).sum(0)
    parts: Sequence[torch.Tensor] = seen.split([len(span.run) for span in spans])
    return parts


def _moved(span: StoredSpan, layer: int, sequence: SequenceInput) -> torch.Tensor:
    """Stored keys and values [2, tokens, heads, dim] with keys turned to where the span is now."""
    device = span.pages.device
    entry = span.entry[layer].to(device)
    if not span.delta:
        return entry
    places = span.rope.places(sequence.positions[:, span.run.start : span.run.end], device)
    turns, moved = span.rope.turns(span.delta, device), torch.empty_like(entry)
    shift_rows(entry, torch.zeros_like(entry), places, turns=turns, is_neox=span.rope.is_neox, out=moved)
    return moved
