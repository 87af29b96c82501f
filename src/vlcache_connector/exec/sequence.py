"""One request's part of recompute passes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from vlcache_connector.exec.batch import Row, VirtualBatch, positions_of
from vlcache_connector.exec.narrow import Narrowed
from vlcache_connector.exec.stored import StoredSpan
from vlcache_connector.types import Run


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """What to compute of a request, and what it takes."""

    token_ids: torch.Tensor  # [tokens] int64, on the CPU
    positions: torch.Tensor  # [3, tokens] int64, on the CPU
    block_ids: Sequence[int]
    runs: Sequence[Run]  # what to compute, in order
    embeddings: Sequence[tuple[int, torch.Tensor]]  # (offset of a span, its encoder output [length, width])
    whole: Sequence[Run] = ()  # whose runs stay in one pass where possible
    narrowed: Sequence[Narrowed] = ()  # those of `whole` of which deeper layers recompute less
    question: Run | None = None  # tokens behind all spans that say what of `narrowed` to go on with
    shifted: Mapping[Run, StoredSpan] = field(default_factory=dict)  # those of `whole` that are loaded on the way
    compared: Mapping[Run, StoredSpan] = field(default_factory=dict)  # those of `narrowed` that are looked into

    @property
    def stored(self) -> Iterator[StoredSpan]:
        """All spans in whose `error` the pass leaves what went wrong."""
        yield from self.shifted.values()
        yield from self.compared.values()

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


def parts_of(batch: VirtualBatch, sequences: Sequence[SequenceInput]) -> Iterator[tuple[SequenceInput, torch.Tensor]]:
    """A pass in parts of one request each, with the positions of its tokens, int64."""
    for number, rows in groupby(batch.rows, key=lambda row: row.request):
        yield sequences[number], positions_of([row.run for row in rows])
