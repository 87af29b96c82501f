"""Right answers and divergences of several methods, with intervals, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grid_model.evaluate import wilson
from grid_model.reuse import Answers

RESAMPLED = 2000


@dataclass
class Tally:
    """Of one method and one kind of prompt. Questions about a scene share its prompt, so scenes are resampled for the
    interval of the divergence; Wilson's interval of the share of right answers takes questions as independent.
    """

    right: list[int] = field(default_factory=list)  # of each scene
    asked: int = 0
    divergences: list[float] = field(default_factory=list)  # means of each scene, nats

    def add(self, expected: Answers, given: Answers) -> None:
        self.right.append(int(given.right.sum()))
        self.asked += len(given.right)
        self.divergences.append(float(expected.divergence(given).mean()))

    def result(self) -> dict[str, Any]:
        """Shares and nats as [value, low, high], 95 %."""
        good = sum(self.right)
        return {
            "right": [good / self.asked, *wilson(good, self.asked)],
            "kl": _interval(np.array(self.divergences)),
            "asked": self.asked,
        }

    def beside(self, other: Tally) -> dict[str, Any]:
        """What this one has more than the other, which was asked about the same scenes, scene by scene."""
        share = self.asked / len(self.right)
        return {
            "right_more": _interval((np.array(self.right) - np.array(other.right)) / share),
            "kl_more": _interval(np.array(self.divergences) - np.array(other.divergences)),
        }


def _interval(values: np.ndarray) -> list[float]:
    """The mean of scenes with its bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLED, len(values))).mean(1)
    return [float(number) for number in (values.mean(), *np.quantile(drawn, (0.025, 0.975)))]


def lines(results: dict[str, dict[str, dict[str, Any]]], value: str, digits: int) -> Iterator[str]:
    """A Markdown table of `value` (a key of the results): a row for each method, a column for each kind of prompt."""
    kinds = list(next(iter(results.values())))
    yield from header(["method", *kinds])
    for method, by_kind in results.items():
        shown = (by_kind[kind][value] for kind in kinds)
        cells = (f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})" for middle, low, high in shown)
        yield f"| {method} | {' | '.join(cells)} |"


def header(titles: Iterable[str]) -> Iterator[str]:
    names = list(titles)
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
