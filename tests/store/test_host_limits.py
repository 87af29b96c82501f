"""The host tier under quotas and times to live: promises one by one, and what holds in any history of any policy."""

import random
from collections import Counter

import pytest

from vlcache_connector.store.eviction.limits import Limits
from vlcache_connector.store.eviction.policies import EVICTION_POLICIES, LRU
from vlcache_connector.store.extents import ALIGNMENT
from vlcache_connector.store.host import HostEntry, HostIndex, State
from vlcache_connector.types import EntryClass

UNIT = ALIGNMENT
KV, EMBEDDING = EntryClass("kv", "image"), EntryClass("embedding", "image")
THEIRS = EntryClass("kv", "image", "aaaa")


class Tier:
    """A host index whose clock the test turns, and what it said about evictions."""

    def __init__(self, num_units: int, limits: Limits, policy: str = "lru") -> None:
        self.now = 1000.0
        self.reasons: list[tuple[bytes, str]] = []
        self.index = HostIndex(
            num_units * UNIT,
            EVICTION_POLICIES[policy],
            limits,
            lambda entry, reason: self.reasons.append((entry.key, reason)),
            lambda: self.now,
        )

    def ready(self, key: bytes, num_units: int = 1, entry_class: EntryClass = KV) -> HostEntry:
        entry = self.index.reserve(key, num_units * UNIT, 1, entry_class)
        assert entry is not None
        self.index.commit(entry)
        self.index.check()
        return entry


def test_a_class_at_its_quota_evicts_its_own_although_there_is_room() -> None:
    tier = Tier(10, Limits({"kv": 0.3}))
    tier.ready(b"e", 2, EMBEDDING)
    for key in (b"a", b"b", b"c", b"d"):
        tier.ready(key)
    assert [key for key in (b"e", b"a", b"b", b"c", b"d") if tier.index.get(key)] == [b"e", b"b", b"c", b"d"]
    assert tier.reasons == [(b"a", "quota")]
    assert tier.index.evictions == 1


def test_each_tenant_is_held_to_its_own_share() -> None:
    tier = Tier(10, Limits({"tenant": 0.2}))
    for number in range(4):
        tier.ready(b"none %d" % number)
        tier.ready(b"theirs %d" % number, 1, THEIRS)
    assert [key for key, _ in tier.reasons] == [b"none 0", b"theirs 0", b"none 1", b"theirs 1"]


@pytest.mark.parametrize("num_units", [4, 100])
def test_an_entry_larger_than_its_quota_evicts_nobody(num_units: int) -> None:
    tier = Tier(10, Limits({"kv": 0.3}))
    for key in (b"a", b"b", b"c"):
        tier.ready(key)
    assert tier.index.reserve(b"huge", num_units * UNIT, 1, KV) is None
    assert (len(tier.index), tier.reasons) == (3, [])


def test_a_quota_full_of_pinned_entries_refuses_and_evicts_nobody() -> None:
    tier = Tier(10, Limits({"kv": 0.3, "image": 0.5}))
    tier.ready(b"e", 2, EMBEDDING)
    pinned, _ = tier.ready(b"a", 2), tier.ready(b"b")
    tier.index.pin(pinned)
    assert tier.index.reserve(b"c", 2 * UNIT, 1, KV) is None
    assert tier.reasons == []
    tier.index.unpin(pinned)
    tier.ready(b"c", 2)
    assert tier.reasons == [(b"b", "quota"), (b"a", "quota")]


def test_a_quota_that_could_be_met_evicts_nobody_when_the_slab_has_no_room() -> None:
    tier = Tier(4, Limits({"kv": 0.5}))
    tier.ready(b"a", 2, KV)
    embedding = tier.ready(b"e", 2, EMBEDDING)
    index = tier.index
    index.pin(embedding)
    index.clear()  # its bytes are taken until it is unpinned
    tier.ready(b"b", 2, KV)
    kept = index.get(b"b")
    assert kept is not None
    index.pin(kept)
    assert index.reserve(b"c", UNIT, 1, EMBEDDING) is None
    index.unpin(kept)
    tier.ready(b"c", 2, KV)
    assert tier.reasons == [(b"b", "quota")]


def test_an_expired_entry_is_not_found_and_may_be_written_again() -> None:
    tier = Tier(4, Limits(ttl_s=10.0))
    tier.ready(b"a")
    tier.now += 9.9
    assert tier.index.get(b"a") is not None
    tier.now += 0.1
    assert tier.index.get(b"a") is None
    assert not tier.index.holds(b"a")
    tier.ready(b"a")
    assert tier.index.get(b"a") is not None
    assert tier.reasons == [(b"a", "expired")]


def test_an_expired_entry_leaves_before_all_others() -> None:
    tier = Tier(3, Limits(ttl_s={"embedding": 10.0}))
    tier.ready(b"old")
    tier.ready(b"e", 1, EMBEDDING)
    tier.ready(b"new")
    tier.now += 10
    tier.ready(b"next")
    assert tier.reasons == [(b"e", "expired")]


def test_what_a_step_has_found_can_be_used_in_it_although_its_time_is_over() -> None:
    tier = Tier(4, Limits(ttl_s=10.0))
    entry = tier.ready(b"a")
    assert tier.index.get(b"a") is entry
    tier.now += 10
    assert tier.index.get_found(b"a") is entry
    tier.index.pin(entry)
    tier.ready(b"b")
    assert entry.state is State.READY, "a pinned entry left"
    again = tier.ready(b"a")
    assert again.extent != entry.extent, "bytes that are still read were given away"
    assert tier.index.get_found(b"a") is again
    tier.index.unpin(entry)
    tier.index.check()
    assert tier.index.get(b"a") is again


def test_an_entry_whose_time_is_over_while_it_is_written_is_never_found() -> None:
    tier = Tier(4, Limits(ttl_s=10.0))
    entry = tier.index.reserve(b"a", UNIT, 1, KV)
    assert entry is not None
    tier.now += 10
    again = tier.ready(b"a")
    tier.index.commit(entry)
    tier.index.check()
    assert tier.index.get(b"a") is again


def test_a_second_pin_of_the_same_request_is_no_second_use() -> None:
    tier = Tier(3, Limits())
    a, b, _ = tier.ready(b"a"), tier.ready(b"b"), tier.ready(b"c")
    for entry, is_use in ((a, False), (b, True)):
        tier.index.pin(entry, is_use)
        tier.index.unpin(entry)
    tier.ready(b"d")
    tier.ready(b"e")
    assert [key for key, _ in tier.reasons] == [b"a", b"c"]


LIMITS = [
    Limits({"kv": 0.5, "tenant": 0.4, "tenant:aaaa": 0.6}),
    Limits({"image": 0.8, "embedding": 0.2}, ttl_s={"kv": 60.0, "tenant:aaaa": 10.0}),
]
CLASSES = [EntryClass(kind, "image", tenant) for kind in ("kv", "embedding") for tenant in ("", "aaaa")]


@pytest.mark.parametrize("limits", LIMITS, ids=["quotas", "quotas and ttl"])
@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_in_any_history_bytes_pins_quotas_and_times_hold(policy: str, limits: Limits) -> None:
    rng, tier, seen = random.Random(policy), Tier(40, limits, policy), Counter[str]()
    index, pins = tier.index, list[HostEntry]()
    born: dict[HostEntry, float] = {}
    for _ in range(3000):
        tier.now += rng.choice([0.0, 0.1, 1.0])
        key = b"%d" % rng.randrange(40)
        entry = index.get(key)
        if entry is None and not index.holds(key):
            before, num_told = {k for k in index._entries if index.get(k)}, len(tier.reasons)
            size, entry_class = rng.randrange(1, 16 * UNIT), rng.choice(CLASSES)
            made = index.reserve(key, size, 1, entry_class, rng.choice([None, rng.random()]))
            told = tier.reasons[num_told:]
            seen.update(reason for _, reason in told)
            if made is None:
                seen["refused"] += 1
                assert {reason for _, reason in told} <= {"expired"}, "evicted for nothing"
                assert all(index.get(k) for k in before)
            else:
                born[made] = tier.now
                index.commit(made) if rng.random() < 0.9 else index.discard(made)
        elif entry is not None and rng.random() < 0.5:
            assert tier.now - born[entry] < limits.ttl_of(entry.entry_class)
            index.pin(entry)
            pins.append(entry)
        elif pins:
            index.unpin(pins.pop(rng.randrange(len(pins))))
        while len(pins) > 4:
            index.unpin(pins.pop(0))
        index.check()
        filled: Counter[str] = Counter()
        for held in index._entries.values():
            filled.update({group: held.extent.nbytes for group, _ in limits.quotas_of(held.entry_class)})
        shares = {group: share for each in CLASSES for group, share in limits.quotas_of(each)}
        assert all(filled[group] <= share * 40 * UNIT for group, share in shares.items())
    expected = {"room", "quota", "refused"} | ({"expired"} if limits.ttl_s else set())
    assert all(seen[what] > 10 for what in expected), seen


def test_without_limits_no_entry_expires() -> None:
    tier = Tier(4, Limits())
    tier.ready(b"a")
    tier.now += 1e9
    assert tier.index.get(b"a") is not None
    assert HostIndex(UNIT, LRU()).get(b"a") is None
