"""Cuts a plan into pieces, one per engine step, so that requests that are decoding keep going meanwhile.

A piece is a range of positions. Pieces follow each other from the start of the plan to its end: what a recomputed token
sees was loaded or computed by then. Where what becomes of a span's tokens depends on others of them, no cut goes
through it: the result must not depend on how busy the engine was.
"""

from collections.abc import Iterator

from vlcache_connector.plan.planner import gaps
from vlcache_connector.types import Measure, ReusePlan, Run

LOADED_PER_COMPUTED = 16
"""Tokens that are loaded in the time of one that is recomputed: 15 with a large model on a fast GPU, 100 on a CPU.
It only keeps the loads of one step in proportion; no result depends on it."""


def next_piece(plan: ReusePlan, start: int, budget: float) -> tuple[Run, float]:
    """The piece from position `start` on whose cost stays within `budget`, and what it costs.

    Costs count recomputed tokens. A piece has at least one token, or one span that must stay whole, so every plan ends.
    """
    position, left = start, budget
    for run, cost in _priced_runs(plan):
        if run.end <= position:
            continue
        wanted = run.end - position
        taken = int(min(wanted, max(0.0, left) / cost)) or int(position == start)
        position += taken
        left -= taken * cost
        if taken < wanted:
            break
    if plan.keeps_spans_whole:
        if plan.measure is Measure.ATTENTION:  # the question looks at all of it before anything is recomputed
            position = plan.end
        return _with_whole_spans(plan, Run(start, position))
    return Run(start, position), budget - left


def _with_whole_spans(plan: ReusePlan, piece: Run) -> tuple[Run, float]:
    """The piece without the span that its end cuts, or with all of it where nothing else is left; and its cost."""
    for part in plan.spans:
        last = min(part.span.end, plan.end)
        if part.reused and part.span.offset < piece.end < last:
            end = part.span.offset if piece.start < part.span.offset else last
            piece = Run(piece.start, end)
            break
    return piece, sum(len(run.intersect(piece)) * cost for run, cost in _priced_runs(plan))


def _priced_runs(plan: ReusePlan) -> Iterator[tuple[Run, float]]:
    """All runs of a plan in order, with the cost of a token."""
    loaded = [(run, 1 / LOADED_PER_COMPUTED) for run in gaps(plan.recomputed, Run(plan.start, plan.end))]
    yield from sorted([*loaded, *((run, 1.0) for run in plan.recomputed)], key=lambda priced: priced[0].start)
