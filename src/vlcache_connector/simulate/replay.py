"""Replays look-ups through a tier of a given size, and computes what no tier of that size could exceed. Pure.

The tier is the real `EvictionOrder` with the real policies, without pins and fragmentation. A miss inserts the entry,
as the engine does once it has computed it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlcache_connector.simulate.recording import Lookup
from vlcache_connector.store.eviction.order import EvictionOrder
from vlcache_connector.store.eviction.policies import EVICTION_POLICIES, EvictionPolicy, Facts

BELADY = "belady"
BOUND = "bound"
INFINITE = "infinite"
MEASURES: dict[str, Callable[[Lookup], float]] = {
    "lookups": lambda lookup: 1.0,
    "bytes": lambda lookup: float(lookup.nbytes),
    "seconds": lambda lookup: lookup.seconds or 0.0,
}
"""What a hit is worth, three ways."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hits of one policy in a tier of one capacity, as shares of what was looked up; None where that is nothing."""

    policy: str
    capacity: int | None  # bytes; None for a tier without bound
    ratios: dict[str, float | None]  # by the names of `MEASURES`
    num_evictions: int | None = None


class Belady:
    """Evicts what is used again last (Belady 1966), knowing the future, and does not keep what is never used again.

    Optimal by number of hits when all entries have one size. With several sizes the optimum is NP-hard, and this is a
    good schedule in hindsight but no limit; the limit is `bound`.
    """

    def __init__(self) -> None:
        self.next_use = math.inf  # of the entry that is being looked up

    def priority(self, facts: Facts, floor: float) -> float:
        return -self.next_use


def replay(
    lookups: Sequence[Lookup], name: str, capacity: int, progress: Callable[[float], None] = lambda share: None
) -> Outcome:
    """Run one policy: a name in `EVICTION_POLICIES`, or `BELADY`."""
    belady = Belady()
    policy: EvictionPolicy = belady if name == BELADY else EVICTION_POLICIES[name]
    future = _next_uses(lookups) if name == BELADY else [math.inf] * len(lookups)
    now = 0.0
    order = EvictionOrder(policy, capacity, clock=lambda: now)
    present: set[bytes] = set()
    hits: list[Lookup] = []
    num_evictions = 0
    for number, lookup in enumerate(lookups):
        now, belady.next_use = lookup.t, future[number]
        if number % 10_000 == 0:
            progress(number / len(lookups))
        if lookup.key in present:
            hits.append(lookup)
            order.used(lookup.key)
            continue
        if lookup.nbytes > capacity or (name == BELADY and belady.next_use == math.inf):
            continue
        for key in order.victims():
            if order.nbytes + lookup.nbytes <= capacity:
                break
            order.removed(key)
            present.discard(key)
            num_evictions += 1
        order.inserted(lookup.key, lookup.nbytes, lookup.entry_class, lookup.seconds)
        present.add(lookup.key)
    return Outcome(name, capacity, _ratios(lookups, hits), num_evictions)


def infinite(lookups: Sequence[Lookup]) -> Outcome:
    """A tier that never evicts: only first look-ups miss."""
    seen: set[bytes] = set()
    hits: list[Lookup] = []
    for lookup in lookups:
        if lookup.key in seen:
            hits.append(lookup)
        seen.add(lookup.key)
    return Outcome(INFINITE, None, _ratios(lookups, hits))


def bound(lookups: Sequence[Lookup], capacity: int) -> Outcome:
    """At least what the best schedule in hindsight reaches, by each measure for itself.

    A hit needs its entry to stay from the previous look-up of it to this one: so many bytes for so many steps. A tier
    has only its capacity times all steps to give, so the hits that are worth most per byte and step, taken until that
    is used up, are a limit (PFOO-L of Berger, Beckmann and Harchol-Balter, SIGMETRICS 2018; the last hit counts in
    part).
    """
    last: dict[bytes, int] = {}
    stays: list[tuple[float, Lookup]] = []  # bytes times steps, the hit that they pay for
    for number, lookup in enumerate(lookups):
        if lookup.key in last and lookup.nbytes <= capacity:
            stays.append((float(lookup.nbytes) * (number - last[lookup.key]), lookup))
        last[lookup.key] = number
    budget = float(capacity) * len(lookups)
    ratios: dict[str, float | None] = {}
    for measure, worth in MEASURES.items():
        total = sum(map(worth, lookups))
        ratios[measure] = _most([(cost, worth(lookup)) for cost, lookup in stays], budget) / total if total else None
    return Outcome(BOUND, capacity, ratios)


def _most(offers: Sequence[tuple[float, float]], budget: float) -> float:
    """The most that (cost, worth) pairs are worth within a budget, when they may be taken in part."""
    reached = 0.0
    for cost, worth in sorted(offers, key=lambda offer: offer[1] / offer[0], reverse=True):
        reached += worth * min(1.0, budget / cost)
        budget -= cost
        if budget <= 0:
            break
    return reached


def _next_uses(lookups: Sequence[Lookup]) -> list[float]:
    """For each look-up, the number of the next one of the same entry."""
    upcoming: dict[bytes, int] = {}
    found = [math.inf] * len(lookups)
    for number in range(len(lookups) - 1, -1, -1):
        key = lookups[number].key
        found[number] = upcoming.get(key, math.inf)
        upcoming[key] = number
    return found


def _ratios(lookups: Sequence[Lookup], hits: Sequence[Lookup]) -> dict[str, float | None]:
    totals = {name: sum(map(worth, lookups)) for name, worth in MEASURES.items()}
    return {name: sum(map(MEASURES[name], hits)) / total if total else None for name, total in totals.items()}
