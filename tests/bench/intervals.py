"""How sure a comparison is: bootstrap intervals, and how well two groups of times can be told apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_SAMPLES = 4000
_PERMUTATIONS = 10_000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


def median(values: Sequence[float]) -> Interval:
    """Of values that were paired before: ratios or differences within a repeat."""
    return _resampled([values], lambda groups: statistics.median(groups[0]))


def difference_of_medians(ones: Sequence[float], others: Sequence[float]) -> Interval:
    return _resampled([ones, others], lambda groups: statistics.median(groups[0]) - statistics.median(groups[1]))


def auc(ones: Sequence[float], others: Sequence[float]) -> Interval:
    """The chance that one of `ones` is larger than one of `others` (ties count half): 0.5 when nothing tells them
    apart, 0 or 1 when everything does.
    """
    return _resampled([ones, others], lambda groups: _auc(groups[0], groups[1]))


def signed_rank_p(ones: Sequence[float], others: Sequence[float]) -> float:
    """How likely the differences of these pairs are so one-sided when which of a pair is which is drawn by a coin
    (Wilcoxon's signed ranks).
    """
    differences = np.subtract(ones, others)
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    signs = np.random.default_rng(_SEED).choice((-1, 1), (_PERMUTATIONS, len(differences)))
    drawn = np.abs((signs * ranks).sum(axis=1))
    return float((drawn >= abs((np.sign(differences) * ranks).sum())).mean())


def _auc(ones: Sequence[float], others: Sequence[float]) -> float:
    differences = np.subtract.outer(np.asarray(ones), np.asarray(others))
    return float((differences > 0).mean() + 0.5 * (differences == 0).mean())


def _resampled(groups: Sequence[Sequence[float]], estimate: Callable[[Sequence[Sequence[float]]], float]) -> Interval:
    dice = np.random.default_rng(_SEED)
    found = []
    for _ in range(_SAMPLES):
        drawn = [[group[i] for i in dice.integers(0, len(group), len(group))] for group in groups]
        found.append(estimate(drawn))
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(estimate(groups), float(low), float(high))
