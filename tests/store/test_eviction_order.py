"""Who leaves a bounded tier: promises one by one, and long random histories of all policies against a brute-force model
that recomputes everything from lists.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from vlcache_connector.config import EVICTION
from vlcache_connector.store.eviction.limits import Limits
from vlcache_connector.store.eviction.order import EvictionOrder
from vlcache_connector.store.eviction.policies import EVICTION_POLICIES, LRU, CostAware, EvictionPolicy, Facts
from vlcache_connector.types import EntryClass

KV, EMBEDDING = EntryClass("kv", "image"), EntryClass("embedding", "image")
TENANTS = ("", "aaaa", "bbbb")
CLASSES = [EntryClass(kind, "image", tenant) for kind in ("kv", "embedding") for tenant in TENANTS]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Erratic:
    """Prices jump up and down: the order must not rely on their rising."""

    def priority(self, facts: Facts, floor: float) -> float:
        return float(random.Random(repr((facts.key, facts.num_uses))).randrange(5))


POLICIES: dict[str, EvictionPolicy] = {**EVICTION_POLICIES, "erratic": Erratic()}


def order_of(policy: EvictionPolicy, capacity: int = 100, limits: Limits | None = None) -> EvictionOrder:
    return EvictionOrder(policy, capacity, limits, Clock())


def evicted(order: EvictionOrder) -> bytes:
    """The next to leave, gone."""
    for key in order.victims():
        order.removed(key)
        return key
    raise AssertionError("there is nobody")


# -- promises ---------------------------------------------------------------------------------------------------------


def test_the_option_names_every_policy() -> None:
    assert set(EVICTION) == set(EVICTION_POLICIES)


def test_least_recently_used_leaves_first() -> None:
    order = order_of(LRU())
    for key in (b"a", b"b", b"c", b"d"):
        order.inserted(key, 1, KV)
    order.used(b"b")
    order.used(b"a")
    assert list(order.victims()) == [b"c", b"d", b"b", b"a"]
    assert list(order.victims()) == [b"c", b"d", b"b", b"a"], "asking changes nothing"


def test_what_the_caller_removes_on_the_way_is_gone_and_what_it_skips_stays_in_place() -> None:
    order = order_of(LRU())
    for key in (b"a", b"b", b"c", b"d"):
        order.inserted(key, 1, KV)
    for key in order.victims():
        if key in (b"b", b"c"):
            order.removed(key)
    order.inserted(b"b", 1, KV)
    assert list(order.victims()) == [b"a", b"d", b"b"]


def test_the_entry_that_saves_fewest_seconds_per_byte_leaves_first() -> None:
    order = order_of(CostAware())
    order.inserted(b"small", 10, EMBEDDING, 5.0)
    order.inserted(b"large", 100, KV, 5.0)
    order.inserted(b"cheap", 10, KV, 0.1)
    assert list(order.victims()) == [b"cheap", b"large", b"small"]
    for _ in range(60):
        order.used(b"cheap")
    assert list(order.victims()) == [b"large", b"small", b"cheap"]


def test_an_entry_that_is_not_visited_ages_and_leaves() -> None:
    """GreedyDual: what comes later starts at the floor that evictions have raised."""
    order = order_of(CostAware())
    order.inserted(b"dear", 1, KV, 10.0)
    for number in range(20):
        key = b"%d" % number
        order.inserted(key, 1, KV, 1.0)
        victim = evicted(order)
        if victim == b"dear":
            break
    assert number == 9, "it was worth ten of the others"


def test_an_entry_without_a_price_counts_as_the_mean_of_its_class() -> None:
    order = order_of(CostAware())
    order.inserted(b"unknown", 10, KV)
    order.inserted(b"cheap", 10, KV, 1.0)
    assert next(order.victims()) == b"unknown", "nothing was known when it came"
    order.inserted(b"dear", 10, KV, 9.0)
    order.inserted(b"other", 10, EMBEDDING, 100.0)
    order.used(b"unknown")  # 2 uses of 5 seconds, the mean of KV
    assert list(order.victims()) == [b"cheap", b"dear", b"unknown", b"other"]


def test_a_class_over_its_quota_evicts_its_own() -> None:
    order = order_of(LRU(), 100, Limits({"kv": 0.3}))
    for key in (b"a", b"b", b"c"):
        order.inserted(key, 10, KV)
    order.inserted(b"e", 50, EMBEDDING)
    assert list(order.quota_victims(20, KV)) == [b"a", b"b", b"c"]
    for key in order.quota_victims(20, KV):
        order.removed(key)
    assert list(order.victims()) == [b"c", b"e"]
    assert list(order.quota_victims(20, KV)) == []
    assert list(order.quota_victims(50, EMBEDDING)) == []


@pytest.mark.parametrize(
    ("quotas", "nbytes", "admitted"),
    [
        ({}, 1000, True),
        ({"kv": 0.3}, 30, True),
        ({"kv": 0.3}, 31, False),
        ({"image": 0.3}, 31, False),
        ({"tenant": 0.3}, 31, False),
        ({"tenant": 0.3, "tenant:aaaa": 0.5}, 50, True),
        ({"tenant": 0.5, "tenant:aaaa": 0.3}, 31, False),
        ({"tenant:bbbb": 0.1}, 90, True),
        ({"embedding": 0.1}, 90, True),
    ],
    ids=repr,
)
def test_an_entry_larger_than_its_quota_is_refused(quotas: dict[str, float], nbytes: int, admitted: bool) -> None:
    assert order_of(LRU(), 100, Limits(quotas)).admits(nbytes, EntryClass("kv", "image", "aaaa")) is admitted


def test_pinned_entries_of_the_class_take_their_part_of_the_quota() -> None:
    order = order_of(LRU(), 100, Limits({"kv": 0.3}))
    order.inserted(b"a", 20, KV)
    order.inserted(b"e", 20, EMBEDDING)
    assert order.admits(30, KV, [])
    assert order.admits(30, KV, [b"e"])
    assert order.admits(10, KV, [b"a", b"e"])
    assert not order.admits(11, KV, [b"a", b"e"])


def test_what_a_quota_evicts_does_not_age_the_others() -> None:
    order = order_of(CostAware(), 100, Limits({"tenant:aaaa": 0.1}))
    theirs = EntryClass("kv", "image", "aaaa")
    order.inserted(b"other", 10, KV, 5.0)
    for number in range(50):
        for key in order.quota_victims(10, theirs):
            order.removed(key)
        order.inserted(b"%d" % number, 10, theirs, 1.0)
    assert next(order.victims()) == b"49", "a busy tenant of cheap entries pushed out a dear one"


@pytest.mark.parametrize(
    ("ttl_s", "expected"),
    [
        (None, math.inf),
        (5.0, 5.0),
        ({"embedding": 5.0}, math.inf),
        ({"kv": 9.0, "image": 7.0}, 7.0),
        ({"kv": 9.0, "tenant": 3.0, "image": 7.0}, 3.0),
        ({"kv": 9.0, "tenant": 3.0, "tenant:aaaa": 20.0}, 9.0),
    ],
)
def test_the_shortest_time_to_live_applies(ttl_s: float | dict[str, float] | None, expected: float) -> None:
    assert Limits(ttl_s=ttl_s).ttl_of(EntryClass("kv", "image", "aaaa")) == expected


def test_expired_entries_are_named_once_their_time_is_over_also_when_they_came_old() -> None:
    clock = Clock()
    order = EvictionOrder(LRU(), 100, Limits(ttl_s={"kv": 10.0}), clock)
    assert order.inserted(b"new", 1, KV) == clock.now + 10
    assert order.inserted(b"old", 1, KV, age_s=7.0) == clock.now + 3
    assert order.inserted(b"other", 1, EMBEDDING) == math.inf
    assert list(order.expired()) == []
    clock.now += 3
    order.used(b"old")  # a use does not prolong its life
    assert list(order.expired()) == [b"old"]
    order.removed(b"old")
    clock.now += 100
    assert list(order.expired()) == [b"new"]


def test_tenants_that_are_gone_leave_nothing_behind() -> None:
    order = order_of(LRU(), 100, Limits({"tenant": 0.5}, ttl_s=5.0))
    for number in range(1000):
        order.inserted(b"%d" % number, 1, EntryClass("kv", "image", f"{number}"))
        order.removed(b"%d" % number)
    assert (len(order), order.nbytes, len(order._classes)) == (0, 0, 0)


def test_the_heaps_do_not_grow_with_uses_and_removals() -> None:
    order = order_of(LRU(), 10**6, Limits({"kv": 1.0}, ttl_s=1e6))
    rng = random.Random(0)
    for number in range(20_000):
        order.inserted(b"%d" % number, 1, KV)
        for _ in range(3):
            order.used(b"%d" % rng.randrange(max(0, number - 50), number + 1))
        if number >= 100:
            order.removed(b"%d" % (number - 100))  # not by way of `victims`
    rankings = [order._all, order._by_age, *order._classes.values()]
    assert all(len(ranking._heap) + len(ranking._offered) <= 2 * 101 + 64 for ranking in rankings)


# -- random histories against a model ---------------------------------------------------------------------------------

CAPACITY = 1000
LIMITS = [
    Limits(),
    Limits({"kv": 0.5, "tenant": 0.4, "tenant:aaaa": 0.6}),
    Limits({"image": 0.8, "embedding": 0.2}, ttl_s=40.0),
    Limits({"tenant": 0.3}, ttl_s={"kv": 30.0, "tenant:bbbb": 10.0}),
]


@dataclass(eq=False)
class Known:
    facts: Facts
    expires_s: float
    priorities: dict[str, float] = field(default_factory=dict)  # in the whole tier (""), and in groups with a quota


class Model:
    """The same promises, by looking at every entry each time."""

    def __init__(self, policy: EvictionPolicy, limits: Limits, clock: Clock) -> None:
        self.policy, self.limits, self.clock = policy, limits, clock
        self.entries: dict[bytes, Known] = {}
        self.floors: Counter[str] = Counter()
        self.pinned: set[bytes] = set()
        self.num_uses = 0
        self.priced: list[Facts] = []

    def groups(self, entry_class: EntryClass) -> dict[str, float]:
        return {"": 1.0, **dict(self.limits.quotas_of(entry_class))}

    def members(self, group: str) -> list[Known]:
        return [known for known in self.entries.values() if group in self.groups(known.facts.entry_class)]

    def touch(self, known: Known) -> None:
        self.num_uses += 1
        facts = known.facts
        facts.last_use = self.num_uses
        if facts.seconds is None:
            peers = [f for f in self.priced if f.entry_class.kind == facts.entry_class.kind]
            if peers:
                mean = sum(f.seconds or 0.0 for f in peers) / sum(f.nbytes for f in peers)
                facts.seconds = mean * facts.nbytes
        for group in self.groups(facts.entry_class):
            known.priorities[group] = self.policy.priority(facts, self.floors[group])

    def insert(self, key: bytes, nbytes: int, entry_class: EntryClass, seconds: float | None) -> list[bytes] | None:
        """Who leaves for it, in order; None when it does not fit."""
        for known in [k for k in self.entries.values() if k.expires_s <= self.clock.now]:
            if known.facts.key not in self.pinned:
                self.drop(known.facts.key)
        groups = self.groups(entry_class)
        for group, share in groups.items():
            stays = sum(k.facts.nbytes for k in self.members(group) if k.facts.key in self.pinned)
            if stays + nbytes > share * CAPACITY:
                return None
        gone = []
        for group, share in [*list(groups.items())[1:], ("", 1.0)]:
            while sum(k.facts.nbytes for k in self.members(group)) + nbytes > share * CAPACITY:
                free = [k for k in self.members(group) if k.facts.key not in self.pinned]
                victim = min(free, key=lambda k: (k.priorities[group], k.facts.last_use))
                self.floors[group] = max(self.floors[group], victim.priorities[group])  # type: ignore[assignment]
                self.drop(victim.facts.key)
                gone.append(victim.facts.key)
        facts = Facts(key, nbytes, entry_class, seconds, self.clock.now, self.clock.now)
        if seconds is not None:
            self.priced.append(Facts(key, nbytes, entry_class, seconds, 0.0, 0.0))
        known = self.entries[key] = Known(facts, self.clock.now + self.limits.ttl_of(entry_class))
        self.touch(known)
        return gone

    def drop(self, key: bytes) -> None:
        known = self.entries.pop(key)
        for group in self.groups(known.facts.entry_class):
            if group and not self.members(group):
                del self.floors[group]


class Tier:
    """A tier bounded by bytes, as one that uses `EvictionOrder` is written."""

    def __init__(self, policy: EvictionPolicy, limits: Limits, clock: Clock) -> None:
        self.order = EvictionOrder(policy, CAPACITY, limits, clock)
        self.sizes: dict[bytes, tuple[int, EntryClass]] = {}
        self.pinned: set[bytes] = set()

    def insert(self, key: bytes, nbytes: int, entry_class: EntryClass, seconds: float | None) -> list[bytes] | None:
        for old in self.order.expired():
            if old not in self.pinned:
                self.drop(old)
        stays = sum(self.sizes[k][0] for k in self.pinned)
        if stays + nbytes > CAPACITY or not self.order.admits(nbytes, entry_class, self.pinned):
            return None
        gone = []
        for victim in self.order.quota_victims(nbytes, entry_class):
            if victim not in self.pinned:
                gone.append(victim)
                self.drop(victim)
        for victim in self.order.victims():
            if self.order.nbytes + nbytes <= CAPACITY:
                break
            if victim not in self.pinned:
                gone.append(victim)
                self.drop(victim)
        self.order.inserted(key, nbytes, entry_class, seconds)
        self.sizes[key] = (nbytes, entry_class)
        return gone

    def drop(self, key: bytes) -> None:
        self.order.removed(key)
        del self.sizes[key]


@pytest.mark.parametrize("limits", LIMITS, ids=["none", "quotas", "both", "ttl by class"])
@pytest.mark.parametrize("name", POLICIES)
def test_long_random_histories_agree_with_the_model_and_keep_every_bound(name: str, limits: Limits) -> None:
    rng, clock, seen = random.Random(name), Clock(), Counter[str]()
    tier, model = Tier(POLICIES[name], limits, clock), Model(POLICIES[name], limits, clock)
    pinned = tier.pinned = model.pinned
    for _ in range(2500):
        clock.now += rng.choice([0.0, 0.0, 0.5, 2.0])
        key = b"%d" % rng.randrange(60)
        move = rng.choices(["insert", "use", "pin", "unpin", "drop"], weights=[40, 40, 10, 12, 2])[0]
        if move == "insert" and key not in tier.sizes:
            nbytes, entry_class = rng.randrange(1, rng.choice([200, 200, 1200])), rng.choice(CLASSES)
            seconds = rng.choice([None, rng.random()])
            held = {k: tier.sizes[k] for k in pinned}
            expected = model.insert(key, nbytes, entry_class, seconds)
            assert tier.insert(key, nbytes, entry_class, seconds) == expected
            seen["refused" if expected is None else "evicting" if expected else "fitting"] += 1
            assert held.items() <= tier.sizes.items(), "a pinned entry left"
        elif key in tier.sizes and move != "insert":
            if move == "use":
                tier.order.used(key)
                model.entries[key].facts.num_uses += 1
                model.touch(model.entries[key])
            elif move == "pin" and len(pinned) < 8:
                pinned.add(key)
            elif move == "unpin":
                pinned.discard(rng.choice(sorted(pinned) or [b""]))
            elif move == "drop" and key not in pinned:
                tier.drop(key)
                model.drop(key)
        assert tier.sizes.keys() == model.entries.keys()
        assert tier.order.nbytes == sum(nbytes for nbytes, _ in tier.sizes.values()) <= CAPACITY
        filled: Counter[str] = Counter()
        for nbytes, entry_class in tier.sizes.values():
            filled.update({group: nbytes for group, _ in limits.quotas_of(entry_class)})
        shares = {g: s for c in CLASSES for g, s in limits.quotas_of(c)}
        assert all(filled[group] <= share * CAPACITY for group, share in shares.items())
    assert all(seen[what] > 20 for what in ("refused", "evicting", "fitting")), seen


# -- what a policy is for ---------------------------------------------------------------------------------------------


def seconds_saved(policy: EvictionPolicy) -> float:
    """Twenty small dear entries that come back, among hundreds of large cheap ones that hardly do."""
    order, rng, saved = order_of(policy, 1000), random.Random(7), 0.0
    present: set[bytes] = set()
    for _ in range(4000):
        is_dear = rng.random() < 0.3
        key = b"dear %d" % rng.randrange(20) if is_dear else b"cheap %d" % rng.randrange(400)
        nbytes, seconds = (10, 1.0) if is_dear else (100, 0.2)
        if key in present:
            saved += seconds
            order.used(key)
            continue
        for victim in order.victims():
            if order.nbytes + nbytes <= 1000:
                break
            order.removed(victim)
            present.discard(victim)
        order.inserted(key, nbytes, KV, seconds)
        present.add(key)
    return saved


def test_cost_aware_eviction_keeps_small_dear_entries_where_lru_loses_them() -> None:
    lru, cost = seconds_saved(LRU()), seconds_saved(CostAware())
    assert cost > 1100, "of 1200 look-ups of dear entries nearly all hit"
    assert lru < 0.5 * cost
