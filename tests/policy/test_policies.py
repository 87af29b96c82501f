"""One matrix over all policies: what every choice of tokens must look like, and what each policy promises."""

import itertools
from fractions import Fraction

import pytest

from vlcache_connector.policy import POLICIES, Policy
from vlcache_connector.types import Run

LENGTHS = [1, 2, 3, 4, 7, 16, 63, 100, 256, 999, 1024, 16384]
# Decimal texts, so that the exact value is known: 0.07 * 100 is 7, although it is 7.000000000000001 in floating point.
RATIOS = ["0", "0.000001", "0.001", "0.01", "0.02", "0.05", "0.07", "0.1", "0.29", "0.3", "0.5", "0.57", "0.999", "1"]

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_length = pytest.mark.parametrize("length", LENGTHS)


def chosen(policy: Policy, length: int, ratio: str) -> set[int]:
    return {offset for run in policy.recompute(length, float(ratio)) for offset in range(run.start, run.end)}


def test_policies_are_listed_under_their_own_names() -> None:
    assert {name: policy.name for name, policy in POLICIES.items()} == {name: name for name in POLICIES}
    assert {"full", "leading", "none"} <= set(POLICIES)


@every_policy
@every_length
def test_runs_are_sorted_disjoint_non_empty_and_within_the_span(policy: Policy, length: int) -> None:
    for ratio in RATIOS:
        edges = [edge for run in policy.recompute(length, float(ratio)) for edge in (run.start, run.end)]
        assert edges == sorted(edges), ratio
        assert all(start < end for start, end in zip(edges[::2], edges[1::2], strict=True)), ratio
        assert all(0 <= edge <= length for edge in edges), ratio


@every_policy
@every_length
def test_choices_are_nested_in_the_ratio(policy: Policy, length: int) -> None:
    """A deeper layer may only drop tokens; so a smaller ratio may only drop them."""
    sets = [chosen(policy, length, ratio) for ratio in RATIOS]
    assert all(small <= large for small, large in itertools.pairwise(sets))


@every_length
def test_full_covers_every_token_and_none_covers_nothing(length: int) -> None:
    for ratio in RATIOS:
        assert POLICIES["full"].recompute(length, float(ratio)) == (Run(0, length),)
        assert POLICIES["none"].recompute(length, float(ratio)) == ()


@every_length
def test_leading_takes_each_token_that_lies_below_the_ratio(length: int) -> None:
    """Token number i is taken when i < ratio * length, in exact arithmetic: their number is the ratio rounded up."""
    for ratio in RATIOS:
        bound = Fraction(ratio) * length
        assert chosen(POLICIES["leading"], length, ratio) == {i for i in range(length) if i < bound}, ratio


@pytest.mark.parametrize(
    ("ratio", "length", "count"),
    [(0.07, 100, 7), (0.29, 100, 29), (0.57, 100, 57), (0.1, 30, 3), (0.05, 1600, 80), (0.05, 1601, 81), (0.05, 1, 1)],
)
def test_leading_is_not_off_by_one_where_floating_point_is(ratio: float, length: int, count: int) -> None:
    assert POLICIES["leading"].recompute(length, ratio) == (Run(0, count),)


@every_length
@pytest.mark.parametrize("ratio", [1e-300, 1e-12, 1e-9, 1e-6, 0.05])
def test_leading_takes_at_least_one_token_of_any_ratio_above_zero(length: int, ratio: float) -> None:
    assert sum(len(run) for run in POLICIES["leading"].recompute(length, ratio)) >= 1


@every_length
def test_leading_takes_nothing_of_ratio_zero_and_everything_of_ratio_one(length: int) -> None:
    assert POLICIES["leading"].recompute(length, 0.0) == ()
    assert POLICIES["leading"].recompute(length, 1.0) == (Run(0, length),)
