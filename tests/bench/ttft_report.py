"""What `bench_ttft` measured: ratios within a repeat, their medians and ranges, and the design's targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.engine import Measured
from bench.photos import Name
from bench.results import table


@dataclass(frozen=True, slots=True)
class Case:
    title: str
    images: tuple[tuple[Name, int, int], ...]  # photograph, columns and rows of image tokens

    @property
    def num_image_tokens(self) -> int:
        return sum(columns * rows for _, columns, rows in self.images)


@dataclass(frozen=True, slots=True)
class Repeat:
    full: Measured
    exact: Measured
    reuse_5: Measured
    reuse_2: Measured

    def variants(self) -> dict[str, Measured]:
        return {"full": self.full, "exact hit": self.exact, "reuse 5 %": self.reuse_5, "reuse 2 %": self.reuse_2}


Results = Mapping[Case, Sequence[Repeat]]


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}-{self.high:.2f}]"


def spread(repeats: Sequence[Repeat], value: Callable[[Repeat], float]) -> Spread:
    values = [value(repeat) for repeat in repeats]
    return Spread(statistics.median(values), min(values), max(values))


RATIOS: dict[str, Callable[[Repeat], float]] = {
    "full / reuse 5 %": lambda r: r.full.engine_s / r.reuse_5.engine_s,
    "full / reuse 2 %": lambda r: r.full.engine_s / r.reuse_2.engine_s,
    "reuse 5 % / exact": lambda r: r.reuse_5.engine_s / r.exact.engine_s,
    "reuse 2 % / exact": lambda r: r.reuse_2.engine_s / r.exact.engine_s,
}
WALL_RATIOS: dict[str, Callable[[Repeat], float]] = {
    "full / reuse 5 %, wall": lambda r: r.full.wall_s / r.reuse_5.wall_s,
    "reuse 5 % / exact, wall": lambda r: r.reuse_5.wall_s / r.exact.wall_s,
}


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio of the design (section 8), for prompts from `min_image_tokens` on."""

    ratio: str
    limit: float
    is_least: bool
    min_image_tokens: int

    def row(self, results: Results) -> list[str]:
        medians = [
            spread(repeats, RATIOS[self.ratio]).median
            for case, repeats in results.items()
            if case.num_image_tokens >= self.min_image_tokens
        ]
        wanted = f"{'>=' if self.is_least else '<='} {self.limit:g}"
        where = f">= {self.min_image_tokens} image tokens"
        if not medians:
            return [self.ratio, where, wanted, "-", "not measured"]
        worst = min(medians) if self.is_least else max(medians)
        is_met = worst >= self.limit if self.is_least else worst <= self.limit
        return [self.ratio, where, wanted, f"{worst:.2f}", "met" if is_met else "missed"]


TARGETS = [
    Target("full / reuse 5 %", 16, True, 8000),
    Target("full / reuse 2 %", 16, True, 8000),
    Target("reuse 5 % / exact", 1.4, False, 1600),
    Target("reuse 2 % / exact", 1.15, False, 1600),
]


def print_results(results: Results) -> None:
    print("\nTime to the first token, engine side, medians; in brackets LLM.generate, wall clock [ms]")
    names = ["full", "exact hit", "reuse 5 %", "reuse 2 %"]
    rows = [[case.title, *_sizes(repeats[0]), *_times(repeats, names)] for case, repeats in results.items()]
    sizes = ["prompt", "recomputed 5 % / 2 %", "computed by exact hit", "encoder's share of full"]
    print(table(["image tokens", *sizes, *names], rows))
    print("\nRatios within a repeat, engine side: median [lowest-highest]")
    _print_ratios(results, RATIOS)
    print("\nThe same, wall clock")
    _print_ratios(results, WALL_RATIOS)
    print("\nTargets (worst median of the prompts concerned)")
    print(table(["ratio", "prompts", "target", "measured", ""], [target.row(results) for target in TARGETS]))
    print()


def report_json(results: Results) -> list[dict[str, Any]]:
    return [
        {
            "case": asdict(case),
            "num_image_tokens": case.num_image_tokens,
            "ratios": {name: asdict(spread(repeats, value)) for name, value in {**RATIOS, **WALL_RATIOS}.items()},
            "repeats": [asdict(repeat) for repeat in repeats],
        }
        for case, repeats in results.items()
    ]


def _sizes(repeat: Repeat) -> list[str]:
    recomputed = [str(one.accounting["recomputed_tokens"]) for one in (repeat.reuse_5, repeat.reuse_2)]
    share = repeat.full.encoder_s / repeat.full.engine_s
    computed = str(repeat.exact.accounting["computed_tokens"])  # the prompt's last, incomplete block
    return [str(repeat.full.num_prompt_tokens), " / ".join(recomputed), computed, f"{share:.0%}"]


def _times(repeats: Sequence[Repeat], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        measured = [repeat.variants()[name] for repeat in repeats]
        engine_s = statistics.median(one.engine_s for one in measured)
        wall_s = statistics.median(one.wall_s for one in measured)
        cells.append(f"{1e3 * engine_s:.0f} ({1e3 * wall_s:.0f})")
    return cells


def _print_ratios(results: Results, ratios: Mapping[str, Callable[[Repeat], float]]) -> None:
    rows = [
        [case.title, *(str(spread(repeats, value)) for value in ratios.values())] for case, repeats in results.items()
    ]
    print(table(["image tokens", *ratios], rows))
