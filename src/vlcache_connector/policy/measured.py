"""What policies have in common whose tokens are chosen within the pass, by a measure of what it has seen."""

from collections.abc import Sequence

from vlcache_connector.policy.base import Choice, Policy, num_chosen
from vlcache_connector.types import Narrowing, Ratio, Run


class Measured(Policy):
    """All tokens of a span up to `layer`; from there on as many as the ratio says. `measure` must be given."""

    layer: int

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        return (Run(0, length),) if ratio > 0 else ()

    def choose(self, length: int, ratio: Ratio, num_layers: int, order: Sequence[int] = ()) -> Choice:
        assert not isinstance(ratio, tuple), "a request with a ratio for each layer is refused"
        runs, count = self.recompute(length, ratio), num_chosen(length, ratio)
        return Choice(runs, (Narrowing(self.layer, count),) if 0 < count < length else ())
