"""Where a recompute pass goes on with fewer tokens of a span than before: which they are.

Some plans say so in advance. In others a measure decides, on what the pass itself has seen: then every rank of a
tensor-parallel group sees its own heads only, and their sum decides for all of them. A rank that could not load the
span has seen nothing, and goes by what the others say.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from vlcache_connector.exec.batch import VirtualBatch, positions_of
from vlcache_connector.types import Narrowing, Run

Total = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a tensor over all ranks, the same on each."""
Scores = Callable[[torch.Tensor], torch.Tensor]
"""Of tokens at positions [n] int64 of a span, fp32 [n]: this rank's part of what says which of them to go on with."""


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A span with fewer recomputed tokens in deeper layers. `num_recomputed`: in the first one."""

    run: Run
    narrowings: Sequence[Narrowing]
    num_recomputed: int

    def at(self, layer: int) -> Narrowing | None:
        return next((one for one in self.narrowings if one.layer == layer), None)


def rows_within(batch: VirtualBatch, request: int, run: Run) -> torch.Tensor:
    """Where in a pass the tokens of a run of a request are: int64."""
    inside = (batch.requests == request) & (batch.positions >= run.start) & (batch.positions < run.end)
    return inside.nonzero()[:, 0]


def kept_at(
    layer: int,
    batch: VirtualBatch,
    spans: Mapping[int, Sequence[Narrowed]],
    scores: Callable[[int, Run], Scores | None],
    total: Total,
    max_rows: int,
) -> torch.Tensor:
    """Which tokens of a pass go on with `layer`: [tokens] bool. Counts of a request's spans are for all of them
    together: one that matters more than another gets more.

    Args:
        spans: by request, those that become fewer somewhere.
        scores: of a request's span what this rank knows of it; None where that is nothing.
        max_rows: runs that the rest of the pass may have.
    """
    keep = torch.ones(batch.num_tokens, dtype=torch.bool)
    open_ones: dict[int, list[tuple[Run, torch.Tensor, int]]] = {}
    for request, span, narrowing in _narrowings(layer, spans):
        rows = rows_within(batch, request, span.run)
        if narrowing.runs or narrowing.count == 0:
            keep[rows] = torch.isin(batch.positions[rows], positions_of(narrowing.runs))
        elif len(rows):
            # A span that one pass cannot hold gets its share in each.
            count = -(-narrowing.count * len(rows) // span.num_recomputed)
            open_ones.setdefault(request, []).append((span.run, rows, count))
    room = max(1, (max_rows - len(batch.rows)) // max(1, len(open_ones)))
    for request, chosen_from in open_ones.items():  # the best of all spans of a request together
        known = [(scores(request, run), rows) for run, rows, _ in chosen_from]
        own = [each(batch.positions[at]) if each is not None else torch.zeros(len(at)) for each, at in known]
        all_rows = torch.cat([rows for _, rows, _ in chosen_from])
        found = total(torch.cat([scored.float().cpu() for scored in own])).cpu()
        keep[all_rows] = _best(found, sum(count for *_, count in chosen_from), room)
    return keep


def _narrowings(layer: int, spans: Mapping[int, Sequence[Narrowed]]) -> Iterator[tuple[int, Narrowed, Narrowing]]:
    for request, narrowed in spans.items():
        for span in narrowed:
            narrowing = span.at(layer)
            if narrowing is not None:
                yield request, span, narrowing


def _best(scores: torch.Tensor, count: int, most_runs: int) -> torch.Tensor:
    """The `count` tokens of the highest scores [n], of equal ones the first, as [n] bool. Neighbours are taken together
    where these alone would make more runs than there may be.
    """
    size = -(-count // most_runs)
    scores = scores.nan_to_num(0.0)
    padded = torch.nn.functional.pad(scores, (0, -len(scores) % size))
    groups = padded.view(-1, size).mean(1)
    chosen = torch.zeros(len(groups), dtype=torch.bool)
    chosen[groups.argsort(descending=True, stable=True)[: -(-count // size)]] = True
    return chosen.repeat_interleave(size)[: len(scores)]
