"""What a report says of shares and of distributions. Pure functions of plain data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

Z_95 = 1.959963984540054
_NOISE = 1e-6
"""Probability that can be missing in float32 log-probabilities although all tokens are there."""


def wilson(hits: int, number: int) -> tuple[float, float]:
    """The 95 % interval of a share (E. B. Wilson, JASA 22, 1927). `number` is above 0."""
    share, spread = hits / number, Z_95**2 / number
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    # With no hit, or all, an end is 0 or 1 exactly, which rounding would miss.
    return (0.0 if hits == 0 else middle - half, 1.0 if hits == number else middle + half)


@dataclass(frozen=True, slots=True)
class Gain:
    """By how much a mean is smaller than another, and half of the 95 % interval of that."""

    mean: float
    error: float

    @property
    def is_sure(self) -> bool:
        return self.mean > self.error


def gain(before: Sequence[float], after: Sequence[float]) -> Gain:
    """Of the same questions in the same order (normal approximation for the mean of differences)."""
    differences = [a - b for a, b in zip(before, after, strict=True)]
    error = Z_95 * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return Gain(fmean(differences), error)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Kullback-Leibler divergence in nats. `rest` is the probability, under p, of tokens that were put into one bucket;
    where it is above 0 the true divergence is at least `kl`.
    """

    kl: float
    rest: float


def divergence(p: Mapping[int, float], q: Mapping[int, float]) -> Divergence:
    """KL(p || q) from log-probabilities by token, of the whole vocabulary or of the likeliest tokens.

    Tokens that are not in both are one bucket: merging outcomes never raises the divergence (Cover & Thomas, Elements
    of Information Theory, the log sum inequality).
    """
    common = [token for token in p.keys() & q.keys() if p[token] > -math.inf]
    terms = [math.exp(p[token]) * (p[token] - q[token]) for token in common]
    rest_p = 1 - math.fsum(math.exp(p[token]) for token in common)
    rest_q = 1 - math.fsum(math.exp(q[token]) for token in common)
    if rest_p <= _NOISE:
        return Divergence(max(0.0, math.fsum(terms)), 0.0)
    terms.append(rest_p * math.log(rest_p / max(rest_q, _NOISE)))
    return Divergence(max(0.0, math.fsum(terms)), rest_p)
