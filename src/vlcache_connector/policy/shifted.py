"""Recompute samples all over each span, and move its other tokens by the mean change that the samples show.

What stands before an image (a number, a legend, a role) changes the KV of all its tokens, and much of that change is
the same for all of them. So few tokens tell what the others would have become; the mean is applied per layer and head,
as far as the samples agree about it. Naive reuse loses this part of the context, and so does `leading`, whose tokens
know their new context while all others keep the old one.

Cost: that of `leading` at the same ratio, and one addition per reused key and value while they are loaded. Source: our
own; the choice of samples is that of stratified sampling.
"""

import math

from vlcache_connector.types import Run

PARTS = 8
"""Samples are the leading tokens of so many equal parts of a span: enough to see how much they differ, and few enough
that attention, which reads the keys again for each run, does not notice."""


class Shifted:
    name = "shifted"
    shifts = True

    def recompute(self, length: int, ratio: float) -> tuple[Run, ...]:
        if ratio <= 0:
            return ()
        parts = min(PARTS, length)
        starts = [i * length // parts for i in range(parts + 1)]
        # Rounded up, as in `leading`; a part without a sample would not be heard.
        rounds, left = divmod(min(length, max(parts, math.ceil(ratio * length - 1e-9))), parts)
        larger_first = sorted(range(parts), key=lambda i: (starts[i] - starts[i + 1], _scattered(i)))
        lengths = {i: rounds + (rank < left) for rank, i in enumerate(larger_first)}
        return _joined([Run(starts[i], starts[i] + lengths[i]) for i in range(parts)])


def _scattered(number: int) -> int:
    """Orders 0 to 7 as 0, 4, 2, 6, 1, 5, 3, 7: the bits in reverse."""
    return int(f"{number:03b}"[::-1], 2)


def _joined(runs: list[Run]) -> tuple[Run, ...]:
    joined = runs[:1]
    for run in runs[1:]:
        if run.start == joined[-1].end:
            joined[-1] = Run(joined[-1].start, run.end)
        else:
            joined.append(run)
    return tuple(joined)
