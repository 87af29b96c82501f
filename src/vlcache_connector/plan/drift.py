"""The drift guard: from the audits of reused requests to the default recompute ratio, and whether reuse goes on at all.

An audit says how far the first token's distribution is from the one that full computation gives. When the latest
audits are too far off on average, the default ratio goes up one step, then the next; behind the last step reuse is
switched off. The way back is the same: at a raised ratio every second audit tries the step below, with reuse switched
off every audit does, and when these are well within the limit the guard goes down to it. All audits before a change
are forgotten, because they tell nothing of the new ratio.

A pure state machine: its state follows from the sequence of audits alone.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vlcache_connector.policy import Policy

WINDOW = 16
"""Audits of one ratio that count, the latest."""
MIN_TO_RAISE = 4
MIN_TO_LOWER = 8
"""Going back is never urgent."""
_WELL_WITHIN = 0.5
"""Share of the limit below which the mean must be to go back: more than half of it, and the guard would swing."""
_WORST = 10.0
"""One audit counts as so many times the limit at most, so that no single one among a full window decides."""
_HIGHEST_RATIO = 0.5
_LOWEST_STEP = 0.02
_PROBE_LENGTH = 1024  # tokens of a span; steps that make no difference there make none


def steps_of(policy: Policy, ratio: float) -> tuple[float, ...]:
    """The ratios that the guard goes through: the configured one, then twice as much each time, up to a half.

    Only ratios with which `policy` recomputes something else: one that ignores its ratio has a single step.
    """
    steps = [ratio]
    while ratio < _HIGHEST_RATIO:
        ratio = min(_HIGHEST_RATIO, max(2 * ratio, _LOWEST_STEP))
        if policy.choose(_PROBE_LENGTH, ratio, 1) != policy.choose(_PROBE_LENGTH, steps[-1], 1):
            steps.append(ratio)
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class Change:
    """The guard went from one level to the next, and why: the mean KL of `num_audits` at the level that they tried."""

    before: int
    after: int
    num_audits: int
    mean_kl: float


class DriftGuard:
    """`level` counts steps; level `len(steps)` means that reuse is switched off. `max_kl`: the limit, in nats."""

    def __init__(self, steps: Sequence[float], max_kl: float) -> None:
        self._steps = tuple(steps)
        self._max_kl = max_kl
        self._served: deque[float] = deque(maxlen=WINDOW)  # audits of the level that requests are served at
        self._tried: deque[float] = deque(maxlen=WINDOW)  # of the level below
        self._num_served = self._num_tried = 0
        self.level = 0

    def is_off_at(self, level: int) -> bool:
        """Whether reuse is switched off at a level."""
        return level == len(self._steps)

    @property
    def is_off(self) -> bool:
        return self.is_off_at(self.level)

    def ratio(self, level: int) -> float:
        """The default recompute ratio at a level; behind the last step, that of the last step."""
        return self._steps[min(level, len(self._steps) - 1)]

    @property
    def level_to_audit(self) -> int:
        """The level whose ratio the next audit is to repeat."""
        tries = self.is_off or (self.level > 0 and self._num_tried < self._num_served)
        return self.level - tries

    def add(self, level: int, kl: float) -> Change | None:
        """Hear of an audit of a level: `kl` in nats, or NaN where damaged values left no distribution. Audits of other
        levels than the present one and the one below are over and out.
        """
        counted = _WORST * self._max_kl if math.isnan(kl) else min(kl, _WORST * self._max_kl)
        if level == self.level and not self.is_off:
            self._served.append(counted)
            self._num_served += 1
            if len(self._served) >= MIN_TO_RAISE and fmean(self._served) > self._max_kl:
                return self._go_to(self.level + 1, self._served)
        elif level == self.level - 1:
            self._tried.append(counted)
            self._num_tried += 1
            if len(self._tried) >= MIN_TO_LOWER and fmean(self._tried) <= _WELL_WITHIN * self._max_kl:
                return self._go_to(self.level - 1, self._tried)
        return None

    def reset(self) -> None:
        """Entries and weights are new: what was learnt is about others."""
        self.level = 0
        self._forget()

    def _go_to(self, level: int, reason: deque[float]) -> Change:
        change = Change(self.level, level, len(reason), fmean(reason))
        self.level = level
        self._forget()
        return change

    def _forget(self) -> None:
        self._served.clear()
        self._tried.clear()
        self._num_served = self._num_tried = 0
