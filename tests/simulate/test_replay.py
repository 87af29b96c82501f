"""Replays against brute force: what a policy reaches, the best that any schedule could, and the bound above both."""

import random
from functools import cache

import pytest

from vlcache_connector.simulate.recording import Lookup
from vlcache_connector.simulate.replay import BELADY, MEASURES, bound, infinite, replay
from vlcache_connector.store.eviction.policies import EVICTION_POLICIES
from vlcache_connector.types import EntryClass

KV = EntryClass("kv", "image")


def lookups_of(keys: str, nbytes: int = 1, seconds: float = 1.0) -> list[Lookup]:
    return [Lookup(float(t), key.encode(), nbytes, seconds, KV) for t, key in enumerate(keys)]


def random_lookups(rng: random.Random, count: int, num_keys: int, sizes: int) -> list[Lookup]:
    known = {number: (rng.randint(1, sizes), rng.random()) for number in range(num_keys)}
    chosen = [min(rng.randrange(num_keys), rng.randrange(num_keys)) for _ in range(count)]
    return [Lookup(float(t), b"%d" % number, *known[number], KV) for t, number in enumerate(chosen)]


def ratio(lookups: list[Lookup], name: str, capacity: int, measure: str = "lookups") -> float:
    found = replay(lookups, name, capacity).ratios[measure]
    assert found is not None
    return found


def best(lookups: list[Lookup], capacity: int, measure: str) -> float:
    """Of all schedules, by trying them all: after each look-up any set of what was there or was looked up may stay."""
    worth = MEASURES[measure]
    sizes = {lookup.key: lookup.nbytes for lookup in lookups}

    @cache
    def from_here(number: int, held: frozenset[bytes]) -> float:
        if number == len(lookups):
            return 0.0
        lookup = lookups[number]
        gained = worth(lookup) if lookup.key in held else 0.0
        candidates = held | {lookup.key}
        subsets: list[frozenset[bytes]] = [frozenset()]
        for key in candidates:
            subsets += [subset | {key} for subset in subsets]
        fitting = [subset for subset in subsets if sum(sizes[key] for key in subset) <= capacity]
        return gained + max(from_here(number + 1, subset) for subset in fitting)

    return from_here(0, frozenset()) / sum(map(worth, lookups))


def test_a_loop_that_does_not_fit_defeats_lru_and_not_the_one_who_knows_the_future() -> None:
    lookups = lookups_of("abc" * 20)
    assert ratio(lookups, "lru", 2) == 0.0
    assert ratio(lookups, BELADY, 2) == pytest.approx(29 / 60, abs=0.02)
    assert ratio(lookups, "lru", 3) == 57 / 60


def test_evictions_are_counted_and_what_is_too_large_is_passed_by() -> None:
    lookups = [*lookups_of("abab"), *lookups_of("cc", nbytes=9), *lookups_of("aba")]
    outcome = replay(lookups, "lru", 1)
    assert (outcome.ratios["lookups"], outcome.num_evictions) == (0.0, 6)
    assert ratio(lookups, "lru", 2) == 5 / 9


def test_hits_are_weighed_by_bytes_and_by_seconds() -> None:
    lookups = [*lookups_of("aa", 10, 1.0), *lookups_of("b", 30, 8.0)]
    assert replay(lookups, "lru", 100).ratios == {"lookups": 1 / 3, "bytes": 10 / 50, "seconds": 1 / 10}
    assert infinite(lookups).ratios == {"lookups": 1 / 3, "bytes": 10 / 50, "seconds": 1 / 10}


def test_where_no_price_is_known_there_is_no_ratio_of_seconds() -> None:
    lookups = lookups_of("aa", seconds=0.0)
    assert replay(lookups, "lru", 1).ratios["seconds"] is None
    assert bound(lookups, 1).ratios["seconds"] is None


@pytest.mark.parametrize("seed", range(6))
def test_belady_is_the_optimum_for_entries_of_one_size(seed: int) -> None:
    lookups = random_lookups(random.Random(seed), 14, 5, 1)
    assert ratio(lookups, BELADY, 2) == pytest.approx(best(lookups, 2, "lookups"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("measure", MEASURES)
def test_the_bound_is_above_the_best_of_all_schedules(seed: int, measure: str) -> None:
    lookups = random_lookups(random.Random(seed), 12, 5, 3)
    limit = bound(lookups, 4).ratios[measure]
    unlimited = infinite(lookups).ratios[measure]
    assert limit is not None and unlimited is not None
    assert best(lookups, 4, measure) <= limit + 1e-9
    assert limit <= unlimited + 1e-9


def test_the_last_hit_within_the_bound_counts_in_part() -> None:
    """Five steps of one byte; each of the two hits needs three of them."""
    assert bound(lookups_of("abcab"), 1).ratios["lookups"] == pytest.approx((1 + 2 / 3) / 5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*EVICTION_POLICIES, BELADY])
def test_no_policy_exceeds_the_bound_and_all_reach_the_unbounded_tier(name: str, seed: int) -> None:
    lookups = random_lookups(random.Random(seed), 2000, 60, 20)
    total = sum({lookup.key: lookup.nbytes for lookup in lookups}.values())
    before = dict.fromkeys(MEASURES, 0.0)
    for capacity in (30, 100, 300, total):
        limits, reached = bound(lookups, capacity).ratios, replay(lookups, name, capacity).ratios
        for measure in MEASURES:
            low, high, floor = reached[measure], limits[measure], before[measure]
            assert low is not None and high is not None
            assert floor < low <= high + 1e-9
            before[measure] = low
    assert before == pytest.approx(infinite(lookups).ratios)


def test_progress_is_told() -> None:
    told: list[float] = []
    replay(lookups_of("ab" * 15_000), "lru", 1, told.append)
    assert len(told) == 3 and told == sorted(told) and all(0 <= share <= 1 for share in told)
