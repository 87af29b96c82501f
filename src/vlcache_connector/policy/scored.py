"""Recompute the tokens that the question looks at: attention of its tokens times the norm of the value, in all layers.

Source: the score of CONDUIT. What is right for this question may be wrong for the next one, so the prefix cache of vLLM
serves what was recomputed to nobody who asks something else.

Cost: that of `leading` at the same ratio, and a pass of the question's tokens and all text before them.
"""

from collections.abc import Sequence

from vlcache_connector.policy.base import Choice, Policy
from vlcache_connector.policy.deviation import chosen_by_measure
from vlcache_connector.types import Measure, Ratio, Run


class Scored(Policy):
    name = "scored"
    measure = Measure.ATTENTION

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        return (Run(0, length),) if ratio > 0 else ()

    def choose(self, length: int, ratio: Ratio, num_layers: int, order: Sequence[int] = ()) -> Choice:
        return chosen_by_measure(self, 0, length, ratio)
