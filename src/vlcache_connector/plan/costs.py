"""Whether a plan pays: what reuse costs against computing the same tokens in the engine's own forward.

The prices are measured in the running engine, on its own traffic. The encoder is not part of the comparison: stored
encoder output serves both sides.
"""

from collections import deque
from dataclasses import dataclass
from statistics import median

from vlcache_connector.types import ReusePlan

_REMEMBERED = 32
_MIN_SAMPLES = 4
MIN_TOKENS = 256
"""Work of fewer tokens than this is not measured: fixed costs would hide the price of a token."""
_NOISE = 1.25
"""Reuse is declined when it costs this many times what computing costs: measurements in a running engine are noisy, and
a plan that saves nothing harms nobody."""


class Price:
    """Seconds per token of one kind of work, the median of the latest measurements."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, num_tokens: int, seconds: float) -> None:
        self._samples.append(seconds / num_tokens)

    @property
    def per_token_s(self) -> float | None:
        """None until there are enough measurements."""
        return median(self._samples) if len(self._samples) >= _MIN_SAMPLES else None


class Prices:
    """What the kinds of work cost in this engine."""

    def __init__(self) -> None:
        self.compute = Price()  # in the engine's forward
        self.recompute = Price()  # in our passes
        self.load = Price()  # from the host tier into pages
        self.encode = Price()  # an embedding

    def add(self, kind: str, num_tokens: int, seconds: float) -> None:
        """One measurement; `kind` is the name of an attribute."""
        price: Price = getattr(self, kind)
        price.add(num_tokens, seconds)

    def saved_by(self, kind: str, num_tokens: int) -> float | None:
        """Engine time that a hit of an entry of this kind saves, in seconds; None while its price is unknown."""
        price = (self.compute if kind == "kv" else self.encode).per_token_s
        return num_tokens * price if price is not None else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds for the covered range of a plan, with reuse and without."""

    reuse_s: float
    compute_s: float

    @property
    def pays(self) -> bool:
        return self.reuse_s < _NOISE * self.compute_s


def estimate(plan: ReusePlan, prices: Prices) -> Estimate | None:
    """None while a price is unknown; reuse is worth trying then. None also for a plan that reuses nothing: who asks for
    full recomputation wants to see it, not to save time.
    """
    compute, recompute, load = (p.per_token_s for p in (prices.compute, prices.recompute, prices.load))
    if compute is None or recompute is None or load is None or plan.num_reused == 0:
        return None
    reuse_s = plan.num_recomputed * recompute + plan.num_reused * load
    return Estimate(reuse_s, (plan.end - plan.start) * compute)
