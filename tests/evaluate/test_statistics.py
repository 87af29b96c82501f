"""Intervals against published values, divergence against brute force."""

import math
import random

import pytest

from vlcache_connector.evaluate.statistics import Z_95, divergence, gain, wilson


# R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (the score interval).
@pytest.mark.parametrize(
    ("hits", "number", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(hits: int, number: int, low: float, high: float) -> None:
    assert wilson(hits, number) == pytest.approx((low, high), abs=5e-5)
    assert wilson(number - hits, number) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("number", [1, 7, 48, 10_000])
def test_an_interval_lies_in_0_to_1_around_its_share(number: int) -> None:
    for hits in {0, 1, number // 2, number}:
        low, high = wilson(hits, number)
        assert 0 <= low <= hits / number <= high <= 1
    assert wilson(0, number)[0] == 0 and wilson(number, number)[1] == 1


# Student's sleep data (Biometrika 6, 1908): ten patients under two drugs; the mean difference is 1.58, its error 0.389.
DRUGS = [(1.9, 0.7), (0.8, -1.6), (1.1, -0.2), (0.1, -1.2), (-0.1, -0.1)]
DRUGS += [(4.4, 3.4), (5.5, 3.7), (1.6, 0.8), (4.6, 0.0), (3.4, 2.0)]


def test_a_gain_is_that_of_pairs() -> None:
    more, less = zip(*DRUGS, strict=True)
    found = gain(more, less)
    assert (found.mean, found.error) == pytest.approx((1.58, Z_95 * 0.389), abs=1e-3)
    assert found.is_sure and not gain(less, more).is_sure


def test_one_pair_or_pairs_of_equals_are_no_sure_gain() -> None:
    assert not gain([1.0], [0.0]).is_sure
    assert not gain([1.0, 2.0], [1.0, 2.0]).is_sure


def distribution(seed: int, size: int = 50, spread: float = 3.0) -> dict[int, float]:
    """Log-probabilities by token."""
    draw = random.Random(seed)
    logits = [draw.gauss(0, spread) for _ in range(size)]
    total = math.log(math.fsum(map(math.exp, logits)))
    return {token: logit - total for token, logit in enumerate(logits)}


def brute_force(p: dict[int, float], q: dict[int, float]) -> float:
    return math.fsum(math.exp(p[token]) * math.log(math.exp(p[token]) / math.exp(q[token])) for token in p)


def likeliest(p: dict[int, float], number: int) -> dict[int, float]:
    return dict(sorted(p.items(), key=lambda item: -item[1])[:number])


@pytest.mark.parametrize("seed", range(20))
def test_over_the_whole_vocabulary_divergence_is_exact(seed: int) -> None:
    p, q = distribution(seed), distribution(seed + 100)
    found = divergence(p, q)
    assert found.kl == pytest.approx(brute_force(p, q), rel=1e-9) and found.rest == 0
    assert divergence(p, p).kl == 0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("number", [1, 5, 20, 49])
def test_over_the_likeliest_tokens_it_is_the_divergence_with_the_rest_as_one_bucket(seed: int, number: int) -> None:
    p, q = distribution(seed), distribution(seed + 100)
    known = likeliest(p, number).keys() & likeliest(q, number).keys()
    found = divergence(likeliest(p, number), likeliest(q, number))
    rest = {name: math.log(math.fsum(math.exp(d[t]) for t in d if t not in known)) for name, d in (("p", p), ("q", q))}
    merged = [{**{t: d[t] for t in known}, -1: rest[name]} for name, d in (("p", p), ("q", q))]
    assert found.kl == pytest.approx(brute_force(*merged), rel=1e-6, abs=1e-5)
    assert found.rest == pytest.approx(math.exp(rest["p"]), abs=1e-6)
    assert found.kl <= brute_force(p, q) + 1e-5, "a lower bound"


def test_distributions_without_a_common_token_are_one_bucket_each() -> None:
    assert divergence({1: -0.1}, {2: -0.1}).kl == 0
    assert divergence({1: -0.1}, {2: -0.1}).rest == 1


def test_a_token_that_is_impossible_adds_nothing() -> None:
    assert divergence({1: 0.0, 2: -math.inf}, {1: math.log(0.5), 2: math.log(0.5)}).kl == pytest.approx(math.log(2))
