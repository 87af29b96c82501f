"""Compute all tokens of a span in the first two layers, and go on with those whose KV differs most from the entry's.

Source: CacheBlend (arXiv:2405.16444), whose tokens of high KV deviation these are. In the first layer KV depends on
nothing but the token, so the second is the first that tells.

Cost: two layers of full recompute, whatever the ratio; the ratio counts from the third layer on.
"""

from collections.abc import Sequence

from vlcache_connector.policy.base import Choice, Policy, num_chosen
from vlcache_connector.types import Measure, Narrowing, Ratio, Run

FULL_LAYERS = 2


class Deviation(Policy):
    name = "deviation"
    measure = Measure.DEVIATION

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        return (Run(0, length),) if ratio > 0 else ()

    def choose(self, length: int, ratio: Ratio, num_layers: int, order: Sequence[int] = ()) -> Choice:
        return chosen_by_measure(self, FULL_LAYERS, length, ratio)


def chosen_by_measure(policy: Policy, layer: int, length: int, ratio: Ratio) -> Choice:
    """All tokens up to a layer, from there on as many as the ratio says."""
    assert isinstance(ratio, float), "options with a ratio for each layer are refused"
    runs, count = policy.recompute(length, ratio), num_chosen(length, ratio)
    return Choice(runs, (Narrowing(layer, count),) if 0 < count < length else ())
