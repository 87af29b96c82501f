"""One request's part of recompute passes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from vlcache_connector.exec.batch import Row, VirtualBatch, positions_of
from vlcache_connector.exec.narrow import Narrowed, rows_within
from vlcache_connector.exec.stored import StoredSpan
from vlcache_connector.types import Run


@dataclass(frozen=True, slots=True)
class EncoderOutput:
    """Of one media item of a request: a row for each token of `runs`, which are several where text stands between."""

    runs: Sequence[Run]  # in order
    rows: torch.Tensor  # [tokens, width]

    def within(self, batch: VirtualBatch, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in a pass the tokens of a request are that have a row, and the number of each one's row: int64."""
        first = self.runs[0].start
        where = rows_within(batch, request, Run(first, self.runs[-1].end))
        positions = batch.positions[where]
        if len(self.runs) == 1:
            return where, positions - first
        starts = torch.tensor([run.start for run in self.runs])
        lengths = torch.tensor([len(run) for run in self.runs])
        run = torch.searchsorted(starts, positions, right=True) - 1
        inside = positions - starts[run]
        has_row = inside < lengths[run]
        return where[has_row], ((lengths.cumsum(0) - lengths)[run] + inside)[has_row]


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """What to compute of a request, and what it takes."""

    token_ids: torch.Tensor  # [tokens] int64, on the CPU
    positions: torch.Tensor  # [3, tokens] int64, on the CPU
    block_ids: Sequence[int]
    runs: Sequence[Run]  # what to compute, in order
    embeddings: Sequence[EncoderOutput]
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
