"""The statistics of the benchmarks, on cases whose answer is known."""

import numpy as np
import pytest

from bench.intervals import auc, difference_of_medians, median, signed_rank_p

LOW, HIGH = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0]


def test_groups_that_do_not_touch_are_told_apart_with_certainty() -> None:
    assert (auc(HIGH, LOW).low, auc(LOW, HIGH).high) == (1.0, 0.0)
    assert difference_of_medians(HIGH, LOW).value == 10.0 and not difference_of_medians(HIGH, LOW).contains(0.0)
    assert signed_rank_p(HIGH, LOW) < 0.02


def test_a_group_is_not_told_apart_from_itself() -> None:
    assert auc(LOW, LOW).value == 0.5 and difference_of_medians(LOW, LOW).contains(0.0)
    assert signed_rank_p(LOW, list(reversed(LOW))) > 0.5


def test_a_shift_that_is_small_beside_the_noise_of_the_moment_shows_in_pairs() -> None:
    """Both of a pair are measured in the same moment."""
    moments = np.random.default_rng(1).normal(0, 1, 60)
    assert signed_rank_p(list(moments + 0.05), list(moments)) < 0.001
    assert auc(list(moments + 0.05), list(moments)).contains(0.5)


def test_chance_alone_is_called_a_difference_about_as_often_as_the_level_says() -> None:
    dice = np.random.default_rng(2)
    found = [signed_rank_p(list(dice.normal(0, 1, 30)), list(dice.normal(0, 1, 30))) < 0.1 for _ in range(100)]
    assert 2 <= sum(found) <= 22  # binomial(100, 0.1) leaves this range once in 5000 times


def test_the_interval_of_a_median_narrows_with_more_values() -> None:
    values = np.random.default_rng(3).normal(1.0, 0.1, 400)
    few, many = median(list(values[:20])), median(list(values))
    assert many.contains(1.0) and many.high - many.low < (few.high - few.low) / 2
    assert str(many).startswith("1") and many.value == pytest.approx(np.median(values))
