"""Recompute the first tokens of each span: the static policy of VLCache (arXiv:2512.12977).

The error that a reused token carries reaches every later token, so the earliest tokens of a span are worth most.
"""

from collections.abc import Sequence

from vlcache_connector.policy.base import Policy, num_chosen
from vlcache_connector.types import Run


class Leading(Policy):
    name = "leading"

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        count = num_chosen(length, ratio)
        return (Run(0, count),) if count > 0 else ()
