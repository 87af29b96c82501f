"""Compute all tokens of a span in the first two layers, and go on with those whose KV differs most from the entry's.

Source: CacheBlend (arXiv:2405.16444), whose tokens of high KV deviation these are. In the first layer KV depends on
nothing but the token, so the second is the first that tells.

Cost: two layers of full recompute, whatever the ratio; the ratio counts from the third layer on.
"""

from vlcache_connector.policy.measured import Measured
from vlcache_connector.types import Measure


class Deviation(Measured):
    name = "deviation"
    measure = Measure.DEVIATION
    layer = 2
