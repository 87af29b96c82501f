"""Virtual sequences: how tokens at scattered positions of several requests become one batch that attention understands.

Each run [a, b) of recomputed tokens is one row: query length b - a, sequence length b, and the block table of its
request. Causal masking aligned to the end of the row then gives each token exactly its own prefix, because in every
layer the KV of the whole batch is written before attention reads. The same holds when the runs of one request are
spread over several passes, as long as earlier positions go first.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from vlcache_connector.types import Run

SHORT_RUN = 16
"""A run of fewer tokens of a span is one of scattered tokens."""


@dataclass(frozen=True, slots=True)
class Row:
    """One virtual sequence: tokens `run` of the request number `request`.

    Rows of one request with the same `whole` stay in one pass where a pass can hold them.
    """

    request: int
    run: Run
    whole: int | None = None

    @property
    def is_scattered(self) -> bool:
        """Depends on nothing but the request: runs of what does not stay together may have been cut anywhere."""
        return self.whole is not None and len(self.run) < SHORT_RUN


@dataclass(frozen=True, slots=True)
class VirtualBatch:
    """One pass. Tensors are on the pages' device unless said otherwise."""

    rows: tuple[Row, ...]
    requests: torch.Tensor  # [tokens] int64, on the CPU: number of each token's request
    positions: torch.Tensor  # [tokens] int64, on the CPU: where in its request it stands
    query_start_loc: torch.Tensor  # [rows + 1] int32, on the CPU
    seq_lens: torch.Tensor  # [rows] int32, on the CPU
    block_table: torch.Tensor  # [rows, blocks] int32
    slots: torch.Tensor  # [tokens] int64

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    @property
    def max_query_len(self) -> int:
        return max(len(row.run) for row in self.rows)

    @property
    def max_seq_len(self) -> int:
        return max(row.run.end for row in self.rows)

    @property
    def scattered(self) -> torch.Tensor:
        """[tokens] bool, on the CPU: whether each is in a row of scattered tokens."""
        return torch.tensor([row.is_scattered for row in self.rows]).repeat_interleave(self.query_start_loc.diff())

    def narrowed(self, keep: torch.Tensor) -> "VirtualBatch":
        """What is left of it: `keep` [tokens] bool, on the CPU. Runs that are cut become rows of their own."""
        positions, requests = self.positions[keep], self.requests[keep]
        row_of = torch.arange(len(self.rows)).repeat_interleave(self.query_start_loc.diff())[keep]
        is_first = torch.ones(len(positions), dtype=torch.bool)
        is_first[1:] = (positions.diff() != 1) | (row_of.diff() != 0)
        starts = is_first.nonzero()[:, 0]
        edges = torch.cat((starts, torch.tensor([len(positions)])))
        of_row = row_of[starts]
        lengths = zip(positions[starts].tolist(), edges.diff().tolist(), strict=True)
        runs = [Run(first, first + length) for first, length in lengths]
        return VirtualBatch(
            rows=tuple(replace(self.rows[old], run=run) for old, run in zip(of_row.tolist(), runs, strict=True)),
            requests=requests,
            positions=positions,
            query_start_loc=edges.int(),
            seq_lens=torch.tensor([run.end for run in runs], dtype=torch.int32),
            block_table=self.block_table[of_row.to(self.block_table.device)],
            slots=self.slots[keep.to(self.slots.device)],
        )


@dataclass(frozen=True, slots=True)
class PassLimits:
    """What the engine batches at most; attention backends size their buffers by it."""

    max_tokens: int
    max_rows: int


def split_passes(rows: Iterable[Row], limits: PassLimits) -> Iterator[tuple[Row, ...]]:
    """Rows in order, cut into passes within the limits; a long run continues in the next pass.

    Rows that belong together begin a new pass where they do not fit into what is left of one. So where they are cut, if
    they must be, depends on nothing but themselves.
    """
    batch: list[Row] = []
    room = limits.max_tokens
    for _, group in groupby(rows, key=lambda row: row if row.whole is None else (row.request, row.whole)):
        together = list(group)
        num_tokens = sum(len(row.run) for row in together)
        is_cut = num_tokens > room or len(batch) + len(together) > limits.max_rows
        if batch and is_cut and together[0].whole is not None:
            yield tuple(batch)
            batch, room = [], limits.max_tokens
        for row in together:
            start = row.run.start
            while start < row.run.end:
                end = min(row.run.end, start + room)
                batch.append(replace(row, run=Run(start, end)))
                room -= end - start
                start = end
                if room == 0 or len(batch) == limits.max_rows:
                    yield tuple(batch)
                    batch, room = [], limits.max_tokens
    if batch:
        yield tuple(batch)


def build_batch(
    rows: Sequence[Row], block_ids: Sequence[Sequence[int]], block_size: int, device: torch.device
) -> VirtualBatch:
    """Tensors of one pass. `block_ids[row.request]` are the blocks of a row's request."""
    tables = torch.zeros(len(block_ids), max(map(len, block_ids)), dtype=torch.int32)
    for table, ids in zip(tables, block_ids, strict=True):
        table[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
    of_row = torch.tensor([row.request for row in rows])
    lengths = torch.tensor([0] + [len(row.run) for row in rows], dtype=torch.int32)
    requests, positions = of_row.repeat_interleave(lengths[1:]), positions_of([row.run for row in rows])
    blocks = tables[requests, positions // block_size].long()
    return VirtualBatch(
        rows=tuple(rows),
        requests=requests,
        positions=positions,
        query_start_loc=lengths.cumsum(0, dtype=torch.int32),
        seq_lens=torch.tensor([row.run.end for row in rows], dtype=torch.int32),
        block_table=tables[of_row].to(device),
        slots=(blocks * block_size + positions % block_size).to(device),
    )


def positions_of(runs: Sequence[Run]) -> torch.Tensor:
    """All positions of runs, in order: int64."""
    lengths = torch.tensor([len(run) for run in runs], dtype=torch.int64)
    starts = torch.tensor([run.start for run in runs], dtype=torch.int64)
    # How far a position is ahead of its number among all of them is the same throughout a run.
    return (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))
