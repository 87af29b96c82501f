"""The host tier's index: promises one by one, and thousands of random steps against a naive model of it."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.extents import ALIGNMENT
from vlcache_connector.store.host import HostEntry, HostIndex, State
from vlcache_connector.types import EntryClass, Extent

UNIT = ALIGNMENT
KV = EntryClass("kv", "image")


def index_of(num_units: int) -> HostIndex:
    return HostIndex(num_units * UNIT, LRU())


def written(index: HostIndex, key: bytes, num_units: int = 1) -> HostEntry:
    """A new entry whose writer is still busy."""
    entry = index.reserve(key, num_units * UNIT, num_units, KV)
    assert entry is not None
    return entry


def ready(index: HostIndex, key: bytes, num_units: int = 1) -> HostEntry:
    entry = written(index, key, num_units)
    index.commit(entry)
    return entry


def overlap(a: Extent, b: Extent) -> bool:
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


# -- promises ---------------------------------------------------------------------------------------------------------


def test_an_entry_is_found_once_its_writer_is_done() -> None:
    index = index_of(4)
    entry = written(index, b"a")
    assert index.get(b"a") is None
    assert index.holds(b"a")
    index.commit(entry)
    assert index.get(b"a") is entry
    assert (entry.key, entry.num_tokens, entry.state, entry.pins) == (b"a", 1, State.READY, 0)
    index.check()


def test_what_was_never_written_is_not_there() -> None:
    index = index_of(4)
    assert index.get(b"a") is None
    assert not index.holds(b"a")
    assert len(index) == 0


def test_a_discarded_entry_never_existed_and_leaves_its_bytes() -> None:
    index = index_of(4)
    index.discard(written(index, b"a", 4))
    index.check()
    assert not index.holds(b"a")
    assert ready(index, b"a", 4).extent == Extent(0, 4 * UNIT)
    assert index.evictions == 0


def test_the_least_recently_used_entry_leaves_first() -> None:
    index = index_of(3)
    a, _, _ = (ready(index, key) for key in (b"a", b"b", b"c"))
    index.pin(a)  # a use
    index.unpin(a)
    for new, gone in [(b"d", b"b"), (b"e", b"c"), (b"f", b"a"), (b"g", b"d")]:
        ready(index, new)
        assert not index.holds(gone)
        index.check()
    assert index.evictions == 4
    assert len(index) == 3


def test_looking_is_not_using() -> None:
    index = index_of(2)
    ready(index, b"a")
    ready(index, b"b")
    index.get(b"a")
    index.holds(b"a")
    ready(index, b"c")
    assert index.get(b"a") is None
    assert index.get(b"b") is not None


def test_no_more_is_evicted_than_is_needed() -> None:
    index = index_of(4)
    for key in (b"a", b"b", b"c", b"d"):
        ready(index, key)
    ready(index, b"e", 2)
    assert [key for key in (b"a", b"b", b"c", b"d", b"e") if index.holds(key)] == [b"c", b"d", b"e"]
    assert index.evictions == 2


def test_a_pinned_entry_is_passed_over() -> None:
    index = index_of(3)
    a, _, _ = (ready(index, key) for key in (b"a", b"b", b"c"))
    index.pin(a)
    ready(index, b"b2")
    index.pin(a)
    index.unpin(a)  # one pin of two is left
    ready(index, b"c2")
    assert index.get(b"a") is a
    assert not index.holds(b"b")
    assert not index.holds(b"c")


def test_an_entry_that_is_being_written_is_passed_over() -> None:
    index = index_of(2)
    written(index, b"a")
    ready(index, b"b")
    ready(index, b"c")
    assert index.holds(b"a")
    assert not index.holds(b"b")


def test_there_is_no_room_when_everything_is_pinned() -> None:
    index = index_of(2)
    entries = [ready(index, key) for key in (b"a", b"b")]
    for entry in entries:
        index.pin(entry)
    assert index.reserve(b"c", UNIT, 1, KV) is None
    assert not index.holds(b"c")
    assert index.evictions == 0
    index.check()


@pytest.mark.parametrize("nbytes", [4 * UNIT + 1, 10**12])
def test_an_entry_larger_than_the_tier_evicts_nobody(nbytes: int) -> None:
    index = index_of(4)
    for key in (b"a", b"b", b"c", b"d"):
        ready(index, key)
    assert index.reserve(b"huge", nbytes, 1, KV) is None
    assert len(index) == 4
    assert index.evictions == 0
    index.check()


def test_an_entry_as_large_as_the_tier_fits() -> None:
    index = index_of(4)
    for key in (b"a", b"b", b"c"):
        ready(index, key)
    assert ready(index, b"all", 4).extent == Extent(0, 4 * UNIT)
    assert (len(index), index.evictions) == (1, 3)


def test_a_cleared_entry_keeps_its_bytes_until_its_reader_is_done() -> None:
    index = index_of(4)
    entry = ready(index, b"a", 2)
    index.pin(entry)
    index.pin(entry)
    assert index.clear() == 1
    assert index.get(b"a") is None
    assert not index.holds(b"a")
    index.check()
    other = ready(index, b"a", 2)  # under the same key, in other bytes
    assert not overlap(entry.extent, other.extent)
    index.unpin(entry)
    assert index.reserve(b"b", 4 * UNIT, 1, KV) is None, "one reader is left"
    index.unpin(entry)
    index.check()
    assert ready(index, b"c", 2).extent == entry.extent


def test_an_entry_that_is_cleared_while_it_is_written_stays_gone() -> None:
    index = index_of(2)
    entry = written(index, b"a", 2)
    index.clear()
    assert index.reserve(b"b", UNIT, 1, KV) is None, "the writer may still write"
    index.commit(entry)
    index.check()
    assert index.get(b"a") is None
    assert entry.state is State.GONE
    assert ready(index, b"b", 2).extent == entry.extent


def test_an_entry_that_is_cleared_and_then_fails_frees_its_bytes_once() -> None:
    index = index_of(2)
    entry = written(index, b"a", 2)
    index.clear()
    index.discard(entry)
    index.check()
    assert ready(index, b"b", 2).extent == entry.extent


def test_the_end_of_a_cleared_writer_does_not_touch_the_new_entry_under_its_key() -> None:
    for finish in (HostIndex.commit, HostIndex.discard):
        index = index_of(4)
        old = written(index, b"a")
        index.clear()
        new = ready(index, b"a")
        finish(index, old)
        index.check()
        assert index.get(b"a") is new
        assert new.extent != old.extent


def test_clearing_counts_entries_and_is_no_eviction() -> None:
    index = index_of(4)
    ready(index, b"a")
    written(index, b"b")
    assert index.clear() == 2
    assert index.clear() == 0
    assert (len(index), index.evictions) == (0, 0)


def test_cleared_entries_are_forgotten_by_the_eviction_policy() -> None:
    index = index_of(2)
    ready(index, b"a")
    ready(index, b"b")
    index.clear()
    for key in (b"c", b"d", b"e", b"f"):
        ready(index, key)
    assert index.evictions == 2


# -- what callers must not do -----------------------------------------------------------------------------------------


def reserve_twice(index: HostIndex) -> None:
    written(index, b"a")
    index.reserve(b"a", UNIT, 1, KV)


def commit_twice(index: HostIndex) -> None:
    index.commit(ready(index, b"a"))


def discard_a_ready_entry(index: HostIndex) -> None:
    index.discard(ready(index, b"a"))


def pin_what_is_gone(index: HostIndex) -> None:
    entry = ready(index, b"a")
    index.clear()
    index.pin(entry)


def unpin_too_often(index: HostIndex) -> None:
    index.unpin(ready(index, b"a"))


ILLEGAL = [
    reserve_twice,
    commit_twice,
    discard_a_ready_entry,
    pin_what_is_gone,
    unpin_too_often,
]


@pytest.mark.parametrize("misuse", ILLEGAL, ids=lambda f: f.__name__)
def test_illegal_steps_are_caught(misuse: Callable[[HostIndex], None]) -> None:
    with pytest.raises(AssertionError):
        misuse(index_of(4))


# -- the index examines itself ----------------------------------------------------------------------------------------


def share_bytes(index: HostIndex) -> None:
    index.reserve(b"x", UNIT, 1, KV)
    a, x = index._entries[b"a"], index._entries[b"x"]
    x.extent = a.extent


def leak_bytes(index: HostIndex) -> None:
    del index._entries[b"a"]


def keep_what_is_gone(index: HostIndex) -> None:
    index._entries[b"a"].state = State.GONE


def lose_the_writers_pin(index: HostIndex) -> None:
    written(index, b"x").pins = 0


@pytest.mark.parametrize("damage", [share_bytes, leak_bytes, keep_what_is_gone, lose_the_writers_pin])
def test_the_self_check_notices_damage(damage: Callable[[HostIndex], None]) -> None:
    index = index_of(4)
    ready(index, b"a")
    index.check()
    damage(index)
    with pytest.raises(AssertionError):
        index.check()


# -- random steps against a model -------------------------------------------------------------------------------------

KEYS = [bytes([65 + number]) for number in range(12)]
NUM_UNITS = 40


@dataclass(eq=False)
class ModelEntry:
    key: bytes
    first: int  # unit
    count: int
    is_ready: bool = False
    pins: int = 1
    is_gone: bool = False


@dataclass
class Model:
    """The host tier, read off lists: one owner per unit, and the present entries in the order of their last use."""

    owners: list[ModelEntry | None] = field(default_factory=lambda: [None] * NUM_UNITS)
    in_use_order: list[ModelEntry] = field(default_factory=list)
    evictions: int = 0

    def find(self, key: bytes) -> ModelEntry | None:
        return next((entry for entry in self.in_use_order if entry.key == key), None)

    def place(self, count: int) -> int | None:
        starts = range(NUM_UNITS - count + 1)
        return next((s for s in starts if not any(self.owners[s : s + count])), None)

    def reserve(self, key: bytes, nbytes: int) -> ModelEntry | None:
        count = -(-nbytes // UNIT)
        starts = range(NUM_UNITS - count + 1)
        if not any(all(not o or o.pins == 0 for o in self.owners[s : s + count]) for s in starts):
            return None  # what is pinned is in the way, so nothing else needs to leave
        while (first := self.place(count)) is None:
            victim = next((entry for entry in self.in_use_order if entry.pins == 0), None)
            if victim is None:
                return None
            self.leave(victim)
            self.evictions += 1
        entry = ModelEntry(key, first, count)
        self.owners[first : first + count] = [entry] * count
        self.in_use_order.append(entry)
        return entry

    def use(self, entry: ModelEntry) -> None:
        self.in_use_order.remove(entry)
        self.in_use_order.append(entry)

    def leave(self, entry: ModelEntry) -> None:
        if not entry.is_gone:
            self.in_use_order.remove(entry)
            entry.is_gone = True
        self.sweep(entry)

    def sweep(self, entry: ModelEntry) -> None:
        if entry.is_gone and entry.pins == 0:
            self.owners = [None if owner is entry else owner for owner in self.owners]


class Pair:
    """The index and its model, driven by the same random steps."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.index = HostIndex(NUM_UNITS * UNIT + 17, LRU())
        self.model = Model()
        self.writers: list[tuple[HostEntry, ModelEntry]] = []
        self.readers: list[tuple[HostEntry, ModelEntry]] = []  # one item per pin
        self.seen: Counter[str] = Counter()

    def step(self) -> None:
        moves = [self.reserve, self.commit, self.discard, self.pin, self.unpin, self.clear]
        move = self.rng.choices(moves, weights=[40, 30, 6, 20, 18, 1])[0]
        move()
        self.index.check()
        self.compare()

    def reserve(self) -> None:
        key = self.rng.choice(KEYS)
        assert self.index.holds(key) == (self.model.find(key) is not None)
        if self.index.holds(key):
            return
        most = 2 * NUM_UNITS if self.rng.random() < 0.1 else 12
        nbytes = self.rng.randrange(1, most * UNIT)
        before = self.model.evictions
        expected, entry = self.model.reserve(key, nbytes), self.index.reserve(key, nbytes, nbytes, KV)
        self.seen["oversize" if nbytes > NUM_UNITS * UNIT else "stored" if expected else "refused"] += 1
        self.seen["evicting"] += self.model.evictions > before
        assert (entry is None) == (expected is None)
        if entry is not None and expected is not None:
            assert entry.num_tokens == nbytes
            self.writers.append((entry, expected))

    def take(self, pairs: list[tuple[HostEntry, ModelEntry]]) -> tuple[HostEntry, ModelEntry] | None:
        return pairs.pop(self.rng.randrange(len(pairs))) if pairs else None

    def commit(self) -> None:
        if pair := self.take(self.writers):
            entry, expected = pair
            self.seen["commit after clear"] += expected.is_gone
            self.index.commit(entry)
            expected.is_ready = True
            expected.pins -= 1
            self.model.sweep(expected)

    def discard(self) -> None:
        if pair := self.take(self.writers):
            entry, expected = pair
            self.index.discard(entry)
            expected.pins -= 1
            self.model.leave(expected)

    def pin(self) -> None:
        key = self.rng.choice(KEYS)
        entry, expected = self.index.get(key), self.model.find(key)
        if entry is not None:
            assert expected is not None
            self.index.pin(entry)
            expected.pins += 1
            self.model.use(expected)
            self.readers.append((entry, expected))

    def unpin(self) -> None:
        if pair := self.take(self.readers):
            entry, expected = pair
            self.seen["unpin after clear"] += expected.is_gone
            self.index.unpin(entry)
            expected.pins -= 1
            self.model.sweep(expected)

    def clear(self) -> None:
        assert self.index.clear() == len(self.model.in_use_order)
        for entry in tuple(self.model.in_use_order):
            self.model.leave(entry)

    def compare(self) -> None:
        assert len(self.index) == len(self.model.in_use_order)
        assert self.index.evictions == self.model.evictions
        for key in KEYS:
            expected = self.model.find(key)
            assert self.index.holds(key) == (expected is not None)
            entry = self.index.get(key)
            assert (entry is not None) == (expected is not None and expected.is_ready)
            if entry is not None and expected is not None:
                assert entry.extent == Extent(expected.first * UNIT, expected.count * UNIT)
                assert entry.pins == expected.pins
        for entry, expected in (*self.writers, *self.readers):  # whoever holds a pin owns these very bytes
            units = self.model.owners[entry.extent.offset // UNIT :][: entry.extent.nbytes // UNIT]
            assert units == [expected] * expected.count


@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_random_steps_agree_with_the_model(seed: int) -> None:
    pair = Pair(seed)
    for _ in range(3000):
        pair.step()
    reached = ["stored", "refused", "oversize", "evicting", "commit after clear", "unpin after clear"]
    assert all(pair.seen[name] >= 5 for name in reached), pair.seen
    for entry, _ in pair.writers:
        pair.index.commit(entry)
    for entry, _ in pair.readers:
        pair.index.unpin(entry)
    pair.index.clear()
    pair.index.check()
    assert ready(pair.index, b"all", NUM_UNITS).extent == Extent(0, NUM_UNITS * UNIT), "bytes leaked"
