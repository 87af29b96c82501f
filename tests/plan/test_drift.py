"""The drift guard: what audits do to the default recompute ratio."""

import math
import random
from statistics import fmean

import pytest

from vlcache_connector.plan.drift import MIN_TO_LOWER, MIN_TO_RAISE, WINDOW, Change, DriftGuard, steps_of
from vlcache_connector.policy import POLICIES

LIMIT = 0.1
GOOD, BAD = 0.01, 0.5
STEPS = (0.05, 0.1, 0.2)
OFF = len(STEPS)


def guard_at(level: int) -> DriftGuard:
    guard = DriftGuard(STEPS, LIMIT)
    for _ in range(level):
        hear(guard, BAD, MIN_TO_RAISE, guard.level)
    assert guard.level == level
    return guard


def hear(guard: DriftGuard, kl: float, times: int, level: int) -> list[Change]:
    return [change for _ in range(times) if (change := guard.add(level, kl)) is not None]


# -- steps ------------------------------------------------------------------------------------------------------------


def test_each_step_doubles_the_ratio_up_to_a_half() -> None:
    assert steps_of(POLICIES["shifted"], 0.05) == (0.05, 0.1, 0.2, 0.4, 0.5)
    assert steps_of(POLICIES["leading"], 0.0) == (0.0, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5)


@pytest.mark.parametrize(("policy", "ratio"), [("none", 0.05), ("full", 0.05), ("leading", 0.5), ("leading", 0.9)])
def test_where_a_higher_ratio_changes_nothing_or_is_none_there_is_one_step(policy: str, ratio: float) -> None:
    assert steps_of(POLICIES[policy], ratio) == (ratio,)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ratio", [0.0, 1e-9, 0.003, 0.05, 0.3, 0.49, 0.5, 1.0])
def test_steps_begin_as_configured_and_rise(policy: str, ratio: float) -> None:
    steps = steps_of(POLICIES[policy], ratio)
    assert steps[0] == ratio and list(steps) == sorted(set(steps))
    assert len(steps) == 1 or steps[-1] == 0.5


# -- up ---------------------------------------------------------------------------------------------------------------


def test_good_audits_change_nothing() -> None:
    guard = DriftGuard(STEPS, LIMIT)
    assert hear(guard, GOOD, 1000, 0) == [] and hear(guard, LIMIT, 1000, 0) == []
    assert guard.level == guard.level_to_audit == 0 and guard.ratio(0) == 0.05


def test_bad_audits_raise_the_ratio_step_by_step_and_then_switch_reuse_off() -> None:
    guard = DriftGuard(STEPS, LIMIT)
    for level in range(OFF):
        assert not guard.is_off and guard.level == level and guard.ratio(level) == STEPS[level]
        assert hear(guard, BAD, MIN_TO_RAISE - 1, level) == []
        assert hear(guard, BAD, 1, level) == [Change(level, level + 1, MIN_TO_RAISE, BAD)]
    assert guard.is_off and guard.is_off_at(OFF) and not guard.is_off_at(OFF - 1)
    assert hear(guard, BAD, 100, OFF) == hear(guard, BAD, 100, OFF - 1) == []


def test_the_mean_of_the_latest_audits_decides() -> None:
    guard = DriftGuard(STEPS, LIMIT)
    hear(guard, 0.0, 1000, 0)
    assert hear(guard, 2 * LIMIT, WINDOW // 2, 0) == [], "half of the window at twice the limit is the limit"
    (change,) = hear(guard, 2 * LIMIT, 1, 0)
    assert change.num_audits == WINDOW and change.mean_kl == pytest.approx(LIMIT * (1 + 2 / WINDOW))


def test_one_wrong_answer_among_many_audits_does_not_decide_however_wrong() -> None:
    for kl in (1e9, math.inf, math.nan):
        guard = DriftGuard(STEPS, LIMIT)
        hear(guard, 0.0, WINDOW, 0)
        assert guard.add(0, kl) is None
        assert guard.add(0, kl) is not None, "two do"


def test_audits_of_the_level_before_do_not_count_against_the_new_one() -> None:
    guard = guard_at(1)
    assert hear(guard, BAD, 100, 0) == [], "jobs that were under way"
    assert hear(guard, BAD, 100, 2) == [] and hear(guard, GOOD, 100, 2) == []
    assert guard.level == 1
    assert hear(guard, BAD, MIN_TO_RAISE, 1) == [Change(1, 2, MIN_TO_RAISE, BAD)]


# -- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", range(1, OFF + 1))
def test_good_audits_of_the_level_below_lead_back_to_it(level: int) -> None:
    guard = guard_at(level)
    assert hear(guard, GOOD, MIN_TO_LOWER - 1, level - 1) == []
    (change,) = hear(guard, GOOD, 1, level - 1)
    assert (change.before, change.after, change.num_audits) == (level, level - 1, MIN_TO_LOWER)
    assert change.mean_kl == pytest.approx(GOOD)


def test_audits_that_are_only_just_within_the_limit_do_not_lead_back() -> None:
    guard = guard_at(OFF)
    assert hear(guard, 0.9 * LIMIT, 1000, OFF - 1) == []
    assert hear(guard, GOOD, WINDOW, OFF - 1) != []


def test_where_reuse_is_off_only_the_level_below_is_audited_and_else_every_second_audit_tries_it() -> None:
    assert guard_at(OFF).level_to_audit == OFF - 1
    guard, audited = guard_at(1), []
    for _ in range(6):
        audited.append(guard.level_to_audit)
        guard.add(audited[-1], LIMIT)
    assert audited == [1, 0, 1, 0, 1, 0]


def test_a_reset_starts_as_configured() -> None:
    guard = guard_at(OFF)
    hear(guard, BAD, 3, OFF - 1)
    guard.reset()
    assert guard.level == 0 and not guard.is_off
    assert hear(guard, BAD, MIN_TO_RAISE - 1, 0) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_state_follows_from_the_audits_alone_and_moves_one_step_at_a_time(seed: int) -> None:
    """Against a model that recounts the whole history."""
    rng = random.Random(seed)
    one, other = DriftGuard(STEPS, LIMIT), DriftGuard(STEPS, LIMIT)
    since: list[tuple[int, float]] = []  # audits since the last change
    level = 0
    for _ in range(3000):
        quality = rng.choice([0.0, 0.3, 1.5, 4.0]) if rng.random() < 0.02 else (since[-1][1] / LIMIT if since else 0.0)
        kl, audited = LIMIT * quality, one.level_to_audit
        assert audited == other.level_to_audit and audited in (level, level - 1)
        change = one.add(audited, kl)
        assert change == other.add(audited, kl)
        since.append((audited, kl))
        here, below = ([k for at, k in since if at == wanted][-WINDOW:] for wanted in (level, level - 1))
        rises = level < OFF and audited == level and len(here) >= MIN_TO_RAISE and fmean(here) > LIMIT
        falls = audited < level and len(below) >= MIN_TO_LOWER and fmean(below) <= LIMIT / 2
        assert (change is not None) == (rises or falls)
        if change is not None:
            assert (change.before, change.after) == (level, level + 1 if rises else level - 1)
            level, since = change.after, []
        assert one.level == other.level == level
