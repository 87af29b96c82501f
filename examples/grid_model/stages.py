"""The curriculum: few cells and one task at first, everything at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from grid_model.batches import Kind

LOOK = {"at": 1.0, "where": 1.0}
COUNT = {"count": 4.0, "at": 1.0, "where": 1.0}
NAMES = {"at": 1.0}
PICTURES = {"at": 2.0, "where": 1.0, "which": 2.0, "hop": 1.0}
HARD = {"at": 1.0, "where": 1.0, "which": 1.0, "hop": 2.0}
ALL = HARD | {"count": 3.0}


@dataclass(frozen=True)
class Stage:
    """`kinds` with the weight of each; a batch has about `tokens` tokens of prefixes and questions in every worker."""

    name: str
    steps: int
    kinds: list[tuple[float, Kind]]
    tokens: int = 1536
    questions: int = 24
    rate: float = 0.004
    last_rate: float | None = None  # reached along half a cosine; None: the rate stays

    def choose(self, random: Generator) -> Kind:
        weights = [weight for weight, _ in self.kinds]
        return self.kinds[random.choice(len(weights), p=[w / sum(weights) for w in weights])][1]

    def size(self, kind: Kind) -> int:
        """Scenes in a batch."""
        prefix = kind.filler + 4 * kind.legend + kind.pictures * (kind.shown * kind.dense + 4)
        return max(1, self.tokens // (prefix + 7 * self.questions))

    def rate_at(self, within: float) -> float:
        last = self.rate if self.last_rate is None else self.last_rate
        return last + (self.rate - last) * 0.5 * (1 + math.cos(math.pi * within))


def kind(tasks: dict[str, float], pictures: int = 1, **more: Any) -> Kind:
    return Kind(tasks, pictures, **{"shift": 300} | more)


# Counts only where all four tokens of a cell exist: with one of four, n matching tokens would mean n and n / 4.
EARLY = [
    (1.5, kind(LOOK, shown=16)),
    (1.0, kind(LOOK, shown=64)),
    (0.5, kind(LOOK, shown=32, filler=60)),
    (2.0, kind(NAMES, shown=12, legend=6, blind=True)),
    (1.5, kind(COUNT, shown=12, dense=4, palette=6)),
    (1.5, kind(COUNT, shown=24, dense=4, palette=20)),
]
SOON = [
    (0.5, kind(LOOK, shown=64)),
    (0.5, kind(LOOK, shown=64, filler=300)),
    (1.5, kind(NAMES, shown=16, legend=8, blind=True)),
    (1.5, kind(COUNT, shown=24, dense=4, palette=20)),
    (0.5, kind(COUNT, 2, shown=12, dense=4, palette=8)),
    (2.0, kind(PICTURES, 2, shown=16)),
    (1.0, kind(PICTURES, 2, shown=64)),
]
MIXED = [
    (1.5, kind(COUNT, dense=4)),
    (2.5, kind(COUNT, shown=24, dense=4, palette=20)),
    (1.5, kind(ALL, 2, shown=20, dense=4, palette=20)),
    (0.5, kind(ALL, 4, shown=12, dense=4, palette=20)),
    (0.5, kind(LOOK, shown=64)),
    (0.5, kind(LOOK, shown=48, filler=400)),
    (0.8, kind(NAMES, legend=4, blind=True)),
    (0.8, kind(NAMES, shown=16, legend=6, filler=60, blind=True)),
    (0.4, kind(NAMES, legend=4)),
    (1.0, kind(HARD, 2, shown=24, legend=6, blind=True)),
    (1.0, kind(HARD, 2, shown=48)),
    (0.5, kind(HARD, 3, shown=48)),
    (0.5, kind(HARD, 4, shown=32)),
]
FULL = [
    (3.0, kind(COUNT, dense=4)),
    (1.0, kind(COUNT, dense=4, filler=500)),
    (1.0, kind(COUNT, shown=24, dense=4, palette=20)),
    (1.0, kind(NAMES, legend=4, dense=4, blind=True)),
    (0.5, kind(NAMES, legend=4, dense=4)),
    (0.8, kind(NAMES, legend=6, filler=60, blind=True)),
    (0.4, kind(NAMES, shown=32, legend=4, filler=500, blind=True, shift=100)),
    (1.5, kind(ALL, 2, dense=4)),
    (1.0, kind(HARD, 2, dense=2, filler=300)),
    (1.2, kind(HARD, 2, legend=4, blind=True)),
    (0.5, kind(HARD, 2, legend=4, dense=4)),
    (1.0, kind(ALL, 3, shown=32, dense=4)),
    (1.0, kind(ALL, 4, shown=24, dense=4)),
    (0.5, kind(HARD, 4)),
]
MOSTLY_COUNT = HARD | {"count": 10.0}
LAST = [
    (2.0, kind(COUNT, dense=4)),
    (1.0, kind(COUNT, dense=4, filler=500)),
    (1.0, kind(COUNT, dense=4, filler=50)),
    (2.0, kind(MOSTLY_COUNT, 2, dense=4)),
    (1.0, kind(MOSTLY_COUNT, 3, dense=4)),
    (0.5, kind(MOSTLY_COUNT, 4, dense=4)),
    (0.4, kind(NAMES, legend=4, dense=4, blind=True)),
    (0.4, kind(NAMES, legend=4, filler=60)),
    (0.4, kind(HARD, 2, legend=4, blind=True)),
    (0.3, kind(HARD, 2, dense=2, filler=300)),
]
STAGES = [
    Stage("early", 320, EARLY, tokens=1024, rate=0.003),
    Stage("soon", 280, SOON, tokens=1024),
    Stage("mixed", 600, MIXED, tokens=1024),
    Stage("full", 550, FULL, last_rate=0.0001),
    Stage("last", 310, LAST, questions=32, rate=0.003, last_rate=0.0001),
]


def stage_at(step: int) -> tuple[Stage, float]:
    """The stage of a step, and the share of it that has passed."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step / stage.steps
        step -= stage.steps
    raise ValueError("behind the last stage")
