"""How layers come to share what is recomputed: by rules of what each is worth, against all ways to share it."""

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pytest

from vlcache_connector.evaluate.calibration import Found, groups_of, ratios_of_quanta, search, sensitivity, too_small
from vlcache_connector.evaluate.meter import Ratios
from vlcache_connector.policy.profile import Profile

Rule = Callable[[Ratios], float]  # -> KL
RATIO = 0.05


def worth(*weights: float, speed: float = 30.0) -> Rule:
    """Each layer takes its weight out of the KL the faster the more it recomputes, whatever the others do."""
    return lambda ratios: sum(w * math.exp(-speed * ratio) for w, ratio in zip(weights, ratios, strict=True))


def chain(*weights: float, speed: float = 30.0) -> Rule:
    """Layers go on with what those before them computed: each is worth something as far as all before it are."""

    def kl(ratios: Ratios) -> float:
        reached, taken = 1.0, 0.0
        for weight, ratio in zip(weights, ratios, strict=True):
            reached *= 1 - math.exp(-speed * ratio)
            taken += weight * reached
        return sum(weights) - taken

    return kl


def found_by(rule: Rule, num_layers: int, ratio: float = RATIO) -> Found:
    """With every vector that is measured looked at."""

    def measure(candidates: Sequence[Ratios]) -> list[float]:
        for ratios in candidates:
            assert len(ratios) == num_layers and all(0 <= each <= 1 for each in ratios)
            assert all(b <= a for a, b in pairwise(ratios)), "a token that was left out has nothing to go on with"
        return [rule(ratios) for ratios in candidates]

    return search(measure, groups_of(num_layers), ratio)


def best_of_all(rule: Rule, num_layers: int) -> float:
    """The least KL of all shares in eighths that do not grow, at the ratio on average."""
    ways = (way for way in product(range(9), repeat=num_layers) if way[0] and all(b <= a for a, b in pairwise(way)))
    return min(rule(Profile("", tuple(map(float, way))).ratios(RATIO)) for way in ways)


# -- groups and quanta ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6, 7, 28, 36, 80])
def test_groups_are_all_layers_in_order_and_nearly_equal(num_layers: int) -> None:
    groups = groups_of(num_layers)
    assert [layer for group in groups for layer in group] == list(range(num_layers))
    assert len(groups) == min(6, num_layers)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@pytest.mark.parametrize(("ratio", "number"), [(0.02, 6), (0.66, 6), (0.7, 5), (0.8, 5), (0.9, 4), (1.0, 4)])
def test_quanta_go_to_one_and_a_half_times_the_ratio_but_not_beyond_all_tokens(ratio: float, number: int) -> None:
    found = ratios_of_quanta(ratio)
    assert len(found) == number and max(found) <= 1 + 1e-9
    assert found[3] == pytest.approx(ratio)


def test_sensitivity_cuts_at_each_group_and_ends_with_uniform() -> None:
    edges = [group.start for group in groups_of(7)] + [7]
    cuts = [(0.1,) * edge + (0.0,) * (7 - edge) for edge in edges]
    assert sensitivity(lambda candidates: list(map(cuts.index, candidates)), groups_of(7), 0.1) == list(range(7))


# -- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 3, 5, 7, 28])
@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_shares_never_grow_and_cost_what_uniform_ones_do(num_layers: int, ratio: float, seed: int) -> None:
    draw = random.Random(seed)
    rule = worth(*(draw.random() ** 3 for _ in range(num_layers)))
    found = found_by(rule, num_layers, ratio)
    assert len(found.shares) == num_layers and found.shares[0] > 0
    assert all(b <= a for a, b in pairwise(found.shares))
    assert sum(found.shares) == pytest.approx(num_layers, abs=1e-4 * num_layers)
    ratios = Profile("", found.shares).ratios(ratio)
    assert sum(ratios) == pytest.approx(num_layers * ratio) or ratios == tuple(float(s > 0) for s in found.shares)
    assert (found.kl, found.kl_uniform) == (rule(ratios), rule((ratio,) * num_layers))


@pytest.mark.parametrize("rule", [worth, chain])
def test_where_only_the_first_layers_matter_they_get_all(rule: Callable[..., Rule]) -> None:
    found = found_by(rule(1, 1, 1, 0, 0, 0), 6)
    assert found.shares[3:] == (0, 0, 0) and sum(found.shares[:3]) == pytest.approx(6)
    assert found.kl < found.kl_uniform


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 1), (0, 0, 1, 0, 0, 1), (1, 2, 3, 4, 5, 6)])
def test_where_the_last_layers_matter_as_much_all_get_the_same(weights: tuple[float, ...]) -> None:
    assert found_by(worth(*weights), 6).shares == (1,) * 6


def test_where_nothing_can_be_told_apart_all_get_the_same() -> None:
    assert found_by(lambda ratios: 0.5, 6).shares == (1,) * 6


def test_of_many_layers_each_group_gets_its_share() -> None:
    found = found_by(worth(*[1.0] * 14, *[0.0] * 14), 28)
    assert found.shares == (2.0,) * 14 + (0.0,) * 14


@pytest.mark.parametrize("rule", [worth, chain])
@pytest.mark.parametrize("num_layers", [3, 4])
@pytest.mark.parametrize("seed", range(40))
def test_what_is_found_is_not_far_from_the_best_of_all(rule: Callable[..., Rule], num_layers: int, seed: int) -> None:
    draw = random.Random(seed)
    kl = rule(*(draw.random() ** 2 for _ in range(num_layers)), speed=draw.uniform(10, 60))
    found, best = found_by(kl, num_layers), best_of_all(kl, num_layers)
    assert found.kl <= found.kl_uniform
    assert found.kl <= 1.05 * best


def test_steps_go_down_to_the_ratio_and_stay_there_as_long_as_that_helps() -> None:
    rule = worth(9, 3, 1)
    found = found_by(rule, 3)
    assert found.steps[0].quanta == (6, 6, 6) and found.steps[0].ratio == pytest.approx(1.5 * RATIO)
    for a, b in pairwise(found.steps):
        changes = {x - y for x, y in zip(a.quanta, b.quanta, strict=True)}
        assert changes <= {0, 1} and sum(b.quanta) < sum(a.quanta)
        assert a.ratio > b.ratio or (a.ratio == b.ratio == RATIO and b.kl < a.kl)
    for step in found.steps:
        scale = step.ratio * 3 / sum(step.quanta)
        assert step.kl == pytest.approx(rule(tuple(scale * n for n in step.quanta)), rel=1e-3)
    assert found.steps[-1].kl == found.kl


# -- small pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "ratio", "advice"),
    [(256, 0.05, "--ratio 0.1 would"), (100, 0.2, "--ratio 0.25 would"), (12, 0.5, "no --ratio would")],
)
def test_pictures_that_are_too_small_are_told_with_a_ratio_that_is_not(length: int, ratio: float, advice: str) -> None:
    warning = too_small(length, ratio)
    assert warning is not None and advice in warning


@pytest.mark.parametrize(("length", "ratio"), [(256, 0.1), (100, 0.25), (1200, 0.021), (100_000, 0.001), (100, 1.0)])
def test_pictures_that_are_large_enough_are_no_matter(length: int, ratio: float) -> None:
    assert too_small(length, ratio) is None
