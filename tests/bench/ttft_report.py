"""What `bench_ttft` measured: ratios within a repeat, their medians and ranges, and the design's targets."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.engine import Measured
from bench.photos import Name
from bench.results import table

FULL, EXACT, LAYERED = "full", "exact hit", "layered 5 %"
PERCENTS = (0, 2, 5, 10)  # of a picture's tokens that reuse recomputes
FLOOR_PERCENTS = (2, 5)  # those for which the engine alone does the same work


def reuse(percent: int) -> str:
    return f"reuse {percent} %"


def same_work(percent: int) -> str:
    return f"same work {percent} %"


VARIANTS = (FULL, EXACT, *map(reuse, PERCENTS), LAYERED, *map(same_work, FLOOR_PERCENTS))


@dataclass(frozen=True, slots=True)
class Case:
    title: str
    images: tuple[tuple[Name, int, int], ...]  # photograph, columns and rows of image tokens

    @property
    def num_image_tokens(self) -> int:
        return sum(columns * rows for _, columns, rows in self.images)


Repeat = Mapping[str, Measured]  # variant -> its answer
Results = Mapping[Case, Sequence[Repeat]]


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}-{self.high:.2f}]"


@dataclass(frozen=True, slots=True)
class Ratio:
    """The time of one variant over that of another, within a repeat."""

    upper: str
    lower: str
    is_wall: bool = False

    def __str__(self) -> str:
        return f"{self.upper} / {self.lower}" + (", wall" if self.is_wall else "")

    def spread(self, repeats: Sequence[Repeat]) -> Spread:
        values = [self._seconds(repeat[self.upper]) / self._seconds(repeat[self.lower]) for repeat in repeats]
        return Spread(statistics.median(values), min(values), max(values))

    def _seconds(self, measured: Measured) -> float:
        return measured.wall_s if self.is_wall else measured.engine_s


# percent -> ratio
SOONER = {percent: Ratio(FULL, reuse(percent)) for percent in PERCENTS}
LATER = {percent: Ratio(reuse(percent), EXACT) for percent in PERCENTS}
FLOOR = {percent: Ratio(same_work(percent), EXACT) for percent in FLOOR_PERCENTS}
BEYOND_FLOOR = {percent: Ratio(reuse(percent), same_work(percent)) for percent in FLOOR_PERCENTS}
SHARED_OUT = [Ratio(LAYERED, EXACT), Ratio(LAYERED, reuse(5))]
WALL = [Ratio(FULL, reuse(5), is_wall=True), Ratio(reuse(5), EXACT, is_wall=True)]
RATIOS = [*SOONER.values(), *LATER.values(), *FLOOR.values(), *BEYOND_FLOOR.values(), *SHARED_OUT, *WALL]


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio of the design (section 8), for prompts from `min_image_tokens` on."""

    ratio: Ratio
    limit: float
    is_least: bool
    min_image_tokens: int

    def row(self, results: Results) -> list[str]:
        medians = [
            self.ratio.spread(repeats).median
            for case, repeats in results.items()
            if case.num_image_tokens >= self.min_image_tokens
        ]
        wanted = f"{'>=' if self.is_least else '<='} {self.limit:g}"
        where = f">= {self.min_image_tokens} image tokens"
        if not medians:
            return [str(self.ratio), where, wanted, "-", "not measured"]
        worst = min(medians) if self.is_least else max(medians)
        is_met = worst >= self.limit if self.is_least else worst <= self.limit
        return [str(self.ratio), where, wanted, f"{worst:.2f}", "met" if is_met else "missed"]


TARGETS = [
    Target(SOONER[5], 16, True, 8000),
    Target(SOONER[2], 16, True, 8000),
    Target(LATER[5], 1.4, False, 1600),
    Target(LATER[2], 1.15, False, 1600),
]


def num_computed(measured: Measured) -> int:
    """Prompt tokens that went through the model's layers: by the engine and, recomputed, by the connector."""
    accounting = measured.accounting
    return int(accounting["computed_tokens"] + accounting["recomputed_tokens"])


def print_results(results: Results) -> None:
    print("\nTokens that go through the model's layers, and the encoder's share of the time of full")
    counts = [[case.title, *_counts(repeats[0])] for case, repeats in results.items()]
    print(table(["image tokens", *VARIANTS, "encoder"], counts))
    print("\nTime to the first token, engine side, medians; in brackets LLM.generate, wall clock [ms]")
    print(table(["image tokens", *VARIANTS], [[case.title, *_times(repeats)] for case, repeats in results.items()]))
    print("\nRatios within a repeat, engine side: median [lowest-highest]")
    _print_ratios(results, SOONER.values())
    print()
    _print_ratios(results, LATER.values())
    print("\nAs many tokens as 5 % of all layers, most in the first and none in the last")
    _print_ratios(results, SHARED_OUT)
    print("\nThe floor: what the engine alone takes for as many tokens at the end of the prompt, and reuse beside that")
    _print_ratios(results, [*FLOOR.values(), *BEYOND_FLOOR.values()])
    print("\nWall clock")
    _print_ratios(results, WALL)
    print("\nTargets (worst median of the prompts concerned)")
    print(table(["ratio", "prompts", "target", "measured", ""], [target.row(results) for target in TARGETS]))
    print()


def report_json(results: Results) -> list[dict[str, Any]]:
    return [
        {
            "case": asdict(case),
            "num_image_tokens": case.num_image_tokens,
            "ratios": {str(ratio): asdict(ratio.spread(repeats)) for ratio in RATIOS},
            "repeats": [{name: asdict(one) for name, one in repeat.items()} for repeat in repeats],
        }
        for case, repeats in results.items()
    ]


def _counts(repeat: Repeat) -> list[str]:
    share = repeat[FULL].encoder_s / repeat[FULL].engine_s
    return [*(str(num_computed(repeat[name])) for name in VARIANTS), f"{share:.0%}"]


def _times(repeats: Sequence[Repeat]) -> list[str]:
    cells = []
    for name in VARIANTS:
        engine_s = statistics.median(repeat[name].engine_s for repeat in repeats)
        wall_s = statistics.median(repeat[name].wall_s for repeat in repeats)
        cells.append(f"{1e3 * engine_s:.0f} ({1e3 * wall_s:.0f})")
    return cells


def _print_ratios(results: Results, ratios: Collection[Ratio]) -> None:
    rows = [[case.title, *(str(ratio.spread(repeats)) for ratio in ratios)] for case, repeats in results.items()]
    print(table(["image tokens", *map(str, ratios)], rows))
