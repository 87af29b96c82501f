"""What a policy is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from vlcache_connector.types import Measure, Narrowing, Ratio, Run


@dataclass(frozen=True, slots=True)
class Choice:
    """Of one span, in token offsets: what is recomputed from the first layer on, and where that becomes less."""

    runs: tuple[Run, ...]
    narrowings: tuple[Narrowing, ...] = ()


class Policy(ABC):
    """Chooses the tokens of one span that are recomputed, and what becomes of the others."""

    name: str
    """Value of the option `policy`; part of the namespace of approximate KV."""
    shifts: bool = False
    """Whether reused tokens follow the change that recomputation made to the chosen ones (`exec.shift`)."""
    measure: Measure | None = None
    """What decides, within the pass, which tokens go on; None where all is known before."""

    @abstractmethod
    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        """Sorted, disjoint, non-empty runs of token offsets within a span of `length` tokens; a smaller ratio may only
        leave some out.

        `order`: some of its tokens, the first n of which stand for all as well as n can (`exec.content`); empty where
        nobody has looked.
        """

    def ratios(self, ratio: float, num_layers: int) -> tuple[float, ...]:
        """What a single ratio means for each layer; none is above the one before."""
        return (ratio,) * num_layers

    def choose(self, length: int, ratio: Ratio, num_layers: int, order: Sequence[int] = ()) -> Choice:
        """The choice for all layers; a token that one layer leaves out has nothing to go on with in the next."""
        ratios = ratio if isinstance(ratio, tuple) else self.ratios(ratio, num_layers)
        first = current = self.recompute(length, ratios[0], order)
        narrowings = []
        for layer in range(1, num_layers):
            if ratios[layer] < ratios[layer - 1]:
                runs = self.recompute(length, ratios[layer], order)
                if runs != current:
                    narrowings.append(Narrowing(layer, sum(map(len, runs)), runs))
                    current = runs
        return Choice(first, tuple(narrowings))


def num_chosen(length: int, ratio: float, at_least: int = 1) -> int:
    """The ratio of so many tokens, rounded up; none of ratio 0."""
    # The epsilon keeps 0.07 * 100 at 7, and must not take the last token of a very small ratio.
    return min(length, max(at_least, math.ceil(ratio * length - 1e-9))) if ratio > 0 else 0
