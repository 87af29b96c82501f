"""Times of functions that are compared, taken in turns: a slow moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median and quartiles of the ratios of paired times."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def times_in_turns(
    functions: Mapping[str, Callable[[], object]], repeats: int, prepare: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each function in each repeat, behind a `prepare` that is not measured. All run once before."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            prepare()
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return times


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Of the times of two functions, repeat by repeat."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)
