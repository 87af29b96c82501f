"""The curriculum: few cells and one task at first, everything at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from numpy.random import Generator

from grid_model.batches import Kind
from grid_model.scenes import MULTIPLE

COUNTING = {"at": 1.0, "where": 1.0, "count": 2.0}
LOOK = {"at": 3.0, "where": 3.0, "count": 1.0}


@dataclass(frozen=True)
class Stage:
    """`kinds` with the weight of each; a batch has about `tokens` tokens of prefixes and questions in every worker."""

    name: str
    steps: int
    kinds: list[tuple[float, Kind]]
    tokens: int = 1536
    questions: int = 24
    rate: float = 0.006
    last_rate: float = 0.006  # reached along half a cosine

    def choose(self, random: Generator) -> Kind:
        weights = [weight for weight, _ in self.kinds]
        return self.kinds[random.choice(len(weights), p=[w / sum(weights) for w in weights])][1]

    def size(self, kind: Kind) -> int:
        """Scenes in a batch."""
        prefix = kind.filler + 4 * kind.legend + kind.pictures * (kind.shown * kind.dense + 4)
        return max(1, self.tokens // (prefix + 7 * self.questions))

    def rate_at(self, within: float) -> float:
        return self.last_rate + (self.rate - self.last_rate) * 0.5 * (1 + math.cos(math.pi * within))


def single(shown: int, dense: int = 1, tasks: dict[str, float] = LOOK) -> Kind:
    return Kind(tasks, shown=shown, dense=dense, shift=300)


BOTH = {"at": 1.0, "where": 1.0}
EARLY = [
    (2.0, single(16, tasks=BOTH)),
    (2.0, single(64, tasks=BOTH)),
    (1.0, replace(single(32, tasks=BOTH), filler=60)),
]
PICTURES = {"at": 2.0, "where": 1.0, "count": 0.5, "which": 2.0, "hop": 0.5}
LEGEND = {"at": 2.0, "meaning": 1.0}
SOON = [
    (1.5, single(64)),
    (0.5, replace(single(64), filler=300)),
    (1.0, Kind(LEGEND, shown=16, legend=8, shift=300)),
    (2.0, Kind(PICTURES, pictures=2, shown=16, shift=300)),
    (1.0, Kind(PICTURES, pictures=2, shown=64, shift=300)),
]
NAMES_FIRST = [
    (1.0, single(64)),
    (2.0, Kind(LEGEND, shown=8, legend=3, shift=300)),
    (2.0, Kind(LEGEND, shown=16, legend=8, shift=300)),
    (1.0, Kind(MULTIPLE, pictures=2, shown=32, shift=300)),
]
HARD = {"at": 1.0, "where": 1.0, "count": 2.0, "which": 1.0, "hop": 2.5}
MIXED = [
    (1.0, single(64, dense=4, tasks=COUNTING)),
    (1.5, single(64, tasks=COUNTING)),
    (1.0, replace(single(48, tasks=COUNTING), filler=400)),
    (1.0, Kind(LEGEND, shown=64, legend=4, shift=300)),
    (1.0, Kind(LEGEND, shown=16, legend=6, filler=60, shift=300)),
    (2.0, Kind(HARD, pictures=2, shown=48, shift=300)),
    (0.5, Kind(HARD, pictures=3, shown=48, shift=300)),
    (0.5, Kind(HARD, pictures=4, shown=32, shift=300)),
]
FULL = [
    (2.0, single(64, dense=4, tasks=COUNTING)),
    (1.0, replace(single(64, dense=2, tasks=COUNTING), filler=500)),
    (1.0, Kind(LEGEND, shown=64, legend=4, dense=4, shift=300)),
    (1.0, Kind(LEGEND, shown=64, legend=6, filler=60, shift=300)),
    (0.5, Kind(LEGEND, shown=32, legend=4, filler=500, shift=100)),
    (1.0, Kind(HARD, pictures=2, dense=4, shift=300)),
    (1.0, Kind(HARD, pictures=2, dense=2, filler=300, shift=300)),
    (1.0, Kind(HARD, pictures=2, legend=4, shift=300)),
    (0.5, Kind(HARD, pictures=3, dense=2, shift=300)),
    (1.0, Kind(HARD, pictures=4, shift=300)),
]
STAGES = [
    Stage("early", 80, EARLY, tokens=1024, questions=16),
    Stage("soon", 220, SOON, tokens=1024),
    Stage("names", 300, NAMES_FIRST, tokens=1024),
    Stage("mixed", 600, MIXED, tokens=1024),
    Stage("full", 300, FULL, last_rate=0.0003),
]


def stage_at(step: int) -> tuple[Stage, float]:
    """The stage of a step, and the share of it that has passed."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step / stage.steps
        step -= stage.steps
    raise ValueError("behind the last stage")
