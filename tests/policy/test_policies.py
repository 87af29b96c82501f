"""One matrix over all policies: what every choice of tokens must look like, and what each policy promises."""

import itertools
import math
import random
from array import array
from collections.abc import Sequence
from fractions import Fraction

import pytest

from vlcache_connector.policy import POLICIES, Policy
from vlcache_connector.types import MAX_ORDERED, Run

LENGTHS = [1, 2, 3, 4, 7, 16, 63, 100, 256, 999, 1024, 16384]
# Decimal texts, so that the exact value is known: 0.07 * 100 is 7, although it is 7.000000000000001 in floating point.
RATIOS = ["0", "0.000001", "0.001", "0.01", "0.02", "0.05", "0.07", "0.1", "0.29", "0.3", "0.5", "0.57", "0.999", "1"]

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_length = pytest.mark.parametrize("length", LENGTHS)


def chosen(policy: Policy, length: int, ratio: str | float, order: Sequence[int] = ()) -> set[int]:
    return {offset for run in policy.recompute(length, float(ratio), order) for offset in range(run.start, run.end)}


def orders(length: int) -> list[Sequence[int]]:
    """What may be known of a span's content: nothing, one token, as much as entries keep, all tokens."""
    tokens = random.Random(length).sample(range(length), length)
    return [(), tokens[:1], memoryview(array("i", tokens[:MAX_ORDERED])), tokens]


def test_policies_are_listed_under_their_own_names() -> None:
    assert {name: policy.name for name, policy in POLICIES.items()} == {name: name for name in POLICIES}
    assert {"full", "leading", "none", "shifted"} <= set(POLICIES)


@every_policy
@every_length
def test_runs_are_sorted_disjoint_non_empty_and_within_the_span(policy: Policy, length: int) -> None:
    for ratio, order in itertools.product(RATIOS, orders(length)):
        runs = policy.recompute(length, float(ratio), order)
        assert all(0 <= run.start < run.end <= length for run in runs), ratio
        assert all(a.end < b.start for a, b in itertools.pairwise(runs)), "neighbours are one run"


@every_policy
@every_length
def test_choices_are_nested_in_the_ratio(policy: Policy, length: int) -> None:
    """A deeper layer may only drop tokens; so a smaller ratio may only drop them."""
    for order in orders(length):
        sets = [chosen(policy, length, ratio, order) for ratio in RATIOS]
        assert all(small <= large for small, large in itertools.pairwise(sets))


@pytest.mark.parametrize("name", ["full", "leading", "none"])
@every_length
def test_policies_that_go_by_position_do_not_ask_for_the_content(name: str, length: int) -> None:
    for ratio, order in itertools.product(RATIOS, orders(length)):
        assert POLICIES[name].recompute(length, float(ratio), order) == POLICIES[name].recompute(length, float(ratio))


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


# -- shifted ----------------------------------------------------------------------------------------------------------

SHIFTED = POLICIES["shifted"]


@every_length
def test_shifted_takes_the_ratio_rounded_up_but_twelve_tokens_where_there_are_so_many(length: int) -> None:
    for ratio, order in itertools.product(RATIOS, orders(length)):
        wanted = min(length, max(12, math.ceil(Fraction(ratio) * length))) if Fraction(ratio) else 0
        assert len(chosen(SHIFTED, length, ratio, order)) == wanted, ratio


@pytest.mark.parametrize("ratio", [1e-300, 1e-12, 1e-9])
def test_shifted_takes_twelve_tokens_of_any_ratio_above_zero(ratio: float) -> None:
    assert len(chosen(SHIFTED, 1000, ratio)) == 12


@pytest.mark.parametrize(("ratio", "length", "count"), [(0.07, 200, 14), (0.29, 100, 29), (0.05, 1601, 81)])
def test_shifted_is_not_off_by_one_where_floating_point_is(ratio: float, length: int, count: int) -> None:
    assert len(chosen(SHIFTED, length, ratio)) == count


@every_length
def test_shifted_takes_nothing_of_ratio_zero_and_everything_of_ratio_one(length: int) -> None:
    for order in orders(length):
        assert SHIFTED.recompute(length, 0.0, order) == ()
        assert SHIFTED.recompute(length, 1.0, order) == (Run(0, length),)


@every_length
def test_shifted_takes_the_first_tokens_of_the_order(length: int) -> None:
    order = orders(length)[-1]
    for ratio in RATIOS[1:]:
        tokens = chosen(SHIFTED, length, ratio, order)
        assert tokens == set(order[: len(tokens)]), ratio


@every_length
def test_an_order_that_ends_too_early_is_used_up_and_the_rest_is_other_tokens(length: int) -> None:
    known = orders(length)[-1]
    for ratio, kept in itertools.product(RATIOS[1:], [1, 5, 8, MAX_ORDERED]):
        tokens = chosen(SHIFTED, length, ratio, known[:kept])
        assert set(known[: min(kept, len(tokens))]) <= tokens
        assert len(tokens) == len(chosen(SHIFTED, length, ratio)), "none was counted twice"


@pytest.mark.parametrize("length", [*range(8, 80), *(length for length in LENGTHS if length >= 80)])
def test_without_an_order_samples_are_everywhere(length: int) -> None:
    """With n samples or more, each of n equal parts has one: n a power of two, as far as halving goes."""
    for ratio in ("0.000001", "0.05", "0.1", "0.29", "0.5"):
        tokens = chosen(SHIFTED, length, ratio)
        parts = 1
        while 2 * parts <= len(tokens):
            parts *= 2
            starts = [number * length // parts for number in range(parts + 1)]
            assert all(tokens & set(range(a, b)) for a, b in itertools.pairwise(starts)), (ratio, parts)


def test_without_an_order_the_first_sixteen_tokens_begin_the_sixteenths() -> None:
    assert SHIFTED.recompute(1600, 0.01) == tuple(Run(start, start + 1) for start in range(0, 1600, 100))


def test_neighbours_of_the_order_are_one_run() -> None:
    order = [9, 30, 10, 0, 11, 50, 29, 1, 70, 72, 71, 99]
    edges = [(0, 2), (9, 12), (29, 31), (50, 51), (70, 73), (99, 100)]
    assert SHIFTED.recompute(100, 0.01, order) == tuple(Run(*pair) for pair in edges)
