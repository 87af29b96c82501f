"""Recompute the tokens that the question looks at: attention of its tokens times the norm of the value, in all layers.

Source: the score of CONDUIT. What is right for this question may be wrong for the next one, so the prefix cache of vLLM
serves what was recomputed to nobody who asks something else.

Cost: that of `leading` at the same ratio, and a pass of the question's tokens and all text before them.
"""

from vlcache_connector.policy.measured import Measured
from vlcache_connector.types import Measure


class Scored(Measured):
    name = "scored"
    measure = Measure.ATTENTION
    layer = 0
