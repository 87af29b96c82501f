"""What was measured, as plain records; ratios are taken within a repeat of one engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.results import say

EXACT = "exact hit"
PLAIN = "plain"


def reuse(ratio: float) -> str:
    """Name of the variant that recomputes this share of a picture's tokens."""
    return f"reuse {ratio:.0%}"


@dataclass(frozen=True, slots=True)
class Record:
    """One answer. `num_tokens` is the size of the case: image tokens, or text tokens where there is no image."""

    system: str
    num_tokens: int
    variant: str
    repeat: int
    seconds: float  # to the first token
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}-{self.high:.3g}]"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Row:
    """One variant of one case, over all repeats."""

    system: str
    num_tokens: int
    variant: str
    seconds: Spread
    plain_over: Spread
    over_exact: Spread

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def rows_of(records: Iterable[Record]) -> list[Row]:
    """In the order of the records. Each repeat of a case must have the variants `PLAIN` and `EXACT`."""
    groups: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.system, record.num_tokens, record.variant), []).append(record)
    rows = []
    for (system, num_tokens, variant), group in groups.items():
        plain, exact = (
            {record.repeat: record.seconds for record in groups[system, num_tokens, name]} for name in (PLAIN, EXACT)
        )
        rows.append(
            Row(
                system,
                num_tokens,
                variant,
                spread([one.seconds for one in group]),
                spread([plain[one.repeat] / one.seconds for one in group]),
                spread([one.seconds / exact[one.repeat] for one in group]),
            )
        )
    return rows


class Budget:
    """Wall-clock time of one part of the benchmark."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def allows(self, what: str, expected_s: float) -> bool:
        """Whether so much is left; what does not fit is told, and kept in `left_out`."""
        left = self._end - time.monotonic()
        if expected_s <= left:
            return True
        self.left_out.append(what)
        say(f"  left out: {what} would take about {expected_s:.0f} s, {max(left, 0):.0f} s are left")
        return False
