"""How the layers of a model should share what is recomputed: what `vlcache calibrate` does.

Layers are put into a few groups, and the ratio is cut into quanta. Every group begins with one and a half times the
ratio, and quanta are taken away, each where that hurts least, until the ratio is left on average. They are not given
out, from nothing upwards, because what a layer recomputes is worth something only if those behind it go on with it: one
group with tokens and none behind it buys next to nothing, whichever it is, and the first steps would be taken by noise.
Downwards, each step starts from something that works. At the end quanta are taken from groups that can still do
without, and all others get more for them.

A token that one layer leaves out has nothing to go on with in the next, so no group has more than the one before. A
quantum is taken from a group together with those behind it that have as many: were it from the last of these alone, a
group that needs little before one that needs much would keep what it has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlcache_connector.evaluate.meter import Measured, Meter, Ratios
from vlcache_connector.evaluate.runs import Asker
from vlcache_connector.evaluate.statistics import Gain, gain
from vlcache_connector.evaluate.tasks import Question
from vlcache_connector.policy.profile import Profile
from vlcache_connector.policy.shifted import Shifted

Measure = Callable[[Sequence[Ratios]], Sequence[float]]
"""Mean KL of each. It is told together what can be measured together, and may be told again what it was told before."""

MAX_GROUPS = 6
NUM_QUANTA = 4
"""Quanta of which the ratio consists."""
_FIRST_QUANTA = 6


@dataclass(frozen=True, slots=True)
class Step:
    """Quanta of each group on the way, as much as they are worth here, and what they were measured to do."""

    quanta: tuple[int, ...]
    ratio: float  # on average over layers
    kl: float


@dataclass(frozen=True, slots=True)
class Found:
    """`shares` of each layer, 1 on average, as a profile takes them. Both KL are at the same ratio on average."""

    shares: tuple[float, ...]
    kl: float
    kl_uniform: float
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """`sensitivity`: see the function of this name. `uniform`, `found`: what both do at the same ratio on average."""

    ratio: float
    num_questions: int
    left_out: Mapping[str, int]  # reason -> questions that reuse nothing
    groups: Sequence[range]
    sensitivity: Sequence[float]
    result: Found
    uniform: Measured
    found: Measured

    @property
    def gain(self) -> Gain:
        return gain(self.uniform.kls, self.found.kls)

    @property
    def shares(self) -> tuple[float, ...]:
        """Those to use: what was found where it is better for sure."""
        return self.result.shares if self.gain.is_sure else (1.0,) * len(self.result.shares)


def calibrate(
    asker: Asker,
    questions: Sequence[Question],
    num_layers: int,
    ratio: float,
    progress: Callable[[int], None],
    warn: Callable[[str], None],
) -> Calibration:
    """The whole of it, through an engine. `progress`: see `about_asked`. Raises `NoReuseError`, `RefusedError`."""
    groups, meter = groups_of(num_layers), Meter(asker, questions, progress)
    lost = sensitivity(meter.measure, groups, ratio)
    warning = too_small(meter.smallest_span, ratio)
    if warning is not None:
        warn(warning)
    result = search(meter.measure, groups, ratio)
    uniform, found = (meter.measured(each) for each in _compared(result.shares, ratio))
    return Calibration(ratio, meter.num_questions, meter.left_out, groups, lost, result, uniform, found)


def about_asked(num_questions: int, num_layers: int, ratio: float) -> int:
    """About how many questions are asked, each in several ways at a time."""
    num_steps = (_first_quanta(ratio) - NUM_QUANTA) * len(groups_of(num_layers))
    return num_questions * (2 + num_steps)


def too_small(length: int, ratio: float) -> str | None:
    """A warning when spans of so many tokens do not tell the ratios of `search` from each other."""
    if _are_different(length, ratio):
        return None
    enough = next(
        (each / 100 for each in range(1, 101) if each / 100 > ratio and _are_different(length, each / 100)), None
    )
    advice = f"--ratio {enough:g} would tell them apart" if enough is not None else "no --ratio would tell them apart"
    tried = ", ".join(f"{each:g}" for each in ratios_of_quanta(ratio))
    return (
        f"a picture has {length:,} tokens, so few that some of the ratios that are tried ({tried}) recompute the same "
        f"number of them; {advice}, and so would larger pictures"
    )


def groups_of(num_layers: int) -> list[range]:
    """At most six groups of layers in order, which differ by one layer at most."""
    number = min(num_layers, MAX_GROUPS)
    edges = [num_layers * index // number for index in range(number + 1)]
    return [range(start, end) for start, end in pairwise(edges)]


def sensitivity(measure: Measure, groups: Sequence[range], ratio: float) -> list[float]:
    """KL when the layers from each group on reuse everything, then KL when none does: all recompute the same."""
    cuts = range(len(groups) + 1)
    return list(measure([_by_layer([ratio] * cut + [0.0] * (len(groups) - cut), groups) for cut in cuts]))


def search(measure: Measure, groups: Sequence[range], ratio: float) -> Found:
    """`ratio` is above 0. The shares are what came out whether or not they are better than uniform ones."""
    (kl_uniform,) = measure([(ratio,) * groups[-1].stop])
    first = _taken_away(measure, groups, ratio)
    last = _taken_over(measure, groups, ratio, first[-1].quanta)
    return Found(_shares(last[-1].quanta, groups), last[-1].kl, kl_uniform, (*first[:-1], *last))


def _taken_away(measure: Measure, groups: Sequence[range], ratio: float) -> list[Step]:
    """From one and a half times the ratio to the first step at which it is the ratio, or less."""
    steps, quanta = [], (_first_quanta(ratio),) * len(groups)
    while True:
        size = _size(quanta, groups)
        ways = _ways(quanta) if size > NUM_QUANTA * groups[-1].stop else []
        kl, *kls = measure([_vector(each, groups, ratio) for each in (quanta, *ways)])
        steps.append(Step(quanta, size * ratio / (NUM_QUANTA * groups[-1].stop), kl))
        if not ways:
            return steps
        harm = [(after - kl) / (size - _size(way, groups)) for after, way in zip(kls, ways, strict=True)]
        quanta = ways[harm.index(min(harm))]  # of equals the first, which leaves the groups most alike


def _taken_over(measure: Measure, groups: Sequence[range], ratio: float, quanta: tuple[int, ...]) -> list[Step]:
    """What is taken from one group goes to all others, as long as that helps: the ratio stays what it is."""
    steps = []
    while True:
        ways = [way for way in _ways(quanta) if any(way)]
        kl, *kls = measure([Profile("", _shares(each, groups)).ratios(ratio) for each in (quanta, *ways)])
        steps.append(Step(quanta, ratio, kl))
        if min(kls, default=kl) >= kl:
            return steps
        quanta = ways[kls.index(min(kls))]


def _compared(shares: tuple[float, ...], ratio: float) -> tuple[Ratios, Ratios]:
    """The ratio in all layers, and what shares make of it."""
    return (ratio,) * len(shares), Profile("", shares).ratios(ratio)


def ratios_of_quanta(ratio: float) -> list[float]:
    """All that `search` may give to a layer, beside 0."""
    return [number * ratio / NUM_QUANTA for number in range(1, _first_quanta(ratio) + 1)]


def _first_quanta(ratio: float) -> int:
    """No layer can recompute more than all tokens."""
    return min(_FIRST_QUANTA, math.floor(NUM_QUANTA / ratio + 1e-9))


def _are_different(length: int, ratio: float) -> bool:
    policy = Shifted()
    counts = [sum(map(len, policy.recompute(length, each))) for each in ratios_of_quanta(ratio)]
    return len(set(counts)) == len(counts)


def _ways(quanta: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One quantum less in one of the groups, and in those behind it that have as many."""
    return [
        tuple(n - 1 if index >= first and n == number else n for index, n in enumerate(quanta))
        for first, number in enumerate(quanta)
        if number > 0
    ]


def _size(quanta: Sequence[int], groups: Sequence[range]) -> int:
    """Quanta times layers."""
    return sum(number * len(group) for number, group in zip(quanta, groups, strict=True))


def _vector(quanta: Sequence[int], groups: Sequence[range], ratio: float) -> Ratios:
    return _by_layer([min(1.0, number * ratio / NUM_QUANTA) for number in quanta], groups)


def _by_layer(values: Sequence[float], groups: Sequence[range]) -> Ratios:
    return tuple(value for value, group in zip(values, groups, strict=True) for _ in group)


def _shares(quanta: Sequence[int], groups: Sequence[range]) -> tuple[float, ...]:
    by_layer = _by_layer(quanta, groups)
    return tuple(round(number * len(by_layer) / sum(by_layer), 4) for number in by_layer)
