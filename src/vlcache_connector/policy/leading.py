"""Recompute the first tokens of each span: the static policy of VLCache (arXiv:2512.12977).

The error that a reused token carries reaches every later token, so the earliest tokens of a span are worth most.
"""

import math
from collections.abc import Sequence

from vlcache_connector.types import Run


class Leading:
    name = "leading"
    shifts = False

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        # Rounded up; the epsilon keeps 0.07 * 100 at 7, and must not take the last token of a very small ratio.
        at_least = 1 if ratio > 0 else 0
        count = min(length, max(at_least, math.ceil(ratio * length - 1e-9)))
        return (Run(0, count),) if count > 0 else ()
