"""The image of a snapshot is what was READY in one moment, whatever happens to the index while it is being taken."""

import random
from collections import Counter

import pytest

from vlcache_connector.errors import SnapshotError
from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.extents import ALIGNMENT
from vlcache_connector.store.host import MAX_HURRIED, HostEntry, HostIndex, SnapshotSize
from vlcache_connector.types import EntryClass, Extent

UNIT = ALIGNMENT
KV = EntryClass("kv", "image")


def index_of(num_units: int) -> HostIndex:
    return HostIndex(num_units * UNIT, LRU())


def ready(index: HostIndex, key: bytes, num_units: int = 1) -> HostEntry:
    entry = index.reserve(key, num_units * UNIT, num_units, KV)
    assert entry is not None
    index.commit(entry)
    return entry


def use(index: HostIndex, entry: HostEntry) -> None:
    index.pin(entry)
    index.unpin(entry)


def taken(index: HostIndex) -> list[bytes]:
    keys = []
    while (entry := index.next_of_snapshot()) is not None:
        keys.append(entry.key)
        index.unpin(entry)
        index.check()
    return keys


def test_an_image_holds_what_was_ready_in_order_of_use_and_nothing_that_came_later() -> None:
    index = index_of(8)
    a, _, _ = (ready(index, key) for key in (b"a", b"b", b"c"))
    use(index, a)
    unfinished = index.reserve(b"unfinished", UNIT, 1, KV)
    assert unfinished is not None
    assert index.begin_snapshot() == SnapshotSize(num_entries=3, nbytes=3 * UNIT)
    index.commit(unfinished)
    ready(index, b"later")
    assert taken(index) == [b"b", b"c", b"a"]
    index.end_snapshot()
    index.check()


def test_a_use_while_the_snapshot_runs_does_not_hide_an_entry_from_it() -> None:
    index = index_of(8)
    a, b, _ = (ready(index, key) for key in (b"a", b"b", b"c"))
    index.begin_snapshot()
    use(index, a)
    first = index.next_of_snapshot()
    assert first is b
    use(index, b)
    index.unpin(b)
    assert taken(index) == [b"c", b"a"]
    index.end_snapshot()
    index.check()


def test_taking_an_entry_is_no_use_of_it() -> None:
    index = index_of(3)
    for key in (b"a", b"b", b"c"):
        ready(index, key)
    index.begin_snapshot()
    taken(index)
    index.end_snapshot()
    ready(index, b"d")
    assert not index.holds(b"a")


def test_the_next_image_has_the_order_of_use_also_when_the_last_one_was_cancelled() -> None:
    index = index_of(8)
    for key in (b"a", b"b", b"c", b"d"):
        ready(index, key)
    index.begin_snapshot()
    first = index.next_of_snapshot()
    assert first is not None
    index.unpin(first)
    ready(index, b"e")
    index.end_snapshot()
    index.check()
    index.begin_snapshot()
    assert taken(index) == [b"a", b"b", b"c", b"d", b"e"]
    index.end_snapshot()


def test_cleared_entries_come_next_and_keep_their_bytes_until_then() -> None:
    index = index_of(3)
    for key in (b"a", b"b", b"c"):
        ready(index, key)
    index.begin_snapshot()
    assert index.clear() == 3
    index.check()
    assert index.reserve(b"d", UNIT, 1, KV) is None
    first = index.next_of_snapshot()
    assert first is not None and first.key == b"a" and first.extent == Extent(0, UNIT)
    assert index.reserve(b"d", UNIT, 1, KV) is None, "it is being written"
    index.unpin(first)
    assert ready(index, b"d").extent == Extent(0, UNIT)
    assert taken(index) == [b"b", b"c"]
    index.end_snapshot()
    assert ready(index, b"e", 2).extent == Extent(UNIT, 2 * UNIT)
    index.check()


def test_a_cancelled_snapshot_lets_go_of_cleared_entries() -> None:
    index = index_of(3)
    for key in (b"a", b"b", b"c"):
        ready(index, key)
    index.begin_snapshot()
    index.clear()
    index.end_snapshot()
    index.check()
    assert ready(index, b"d", 3).extent == Extent(0, 3 * UNIT)


def test_an_insert_takes_no_bytes_from_the_image_but_what_it_wants_is_written_next() -> None:
    index = index_of(3)
    a, _, c = (ready(index, key) for key in (b"a", b"b", b"c"))
    index.begin_snapshot()
    index.pin(a)
    assert index.reserve(b"d", 2 * UNIT, 1, KV) is None
    assert index.evictions == 0
    assert len(index) == 3, "what is of no use to the insert must stay"
    index.check()
    first = index.next_of_snapshot()
    assert first is c, "the last one that the insert passed over"
    index.unpin(c)
    second = index.next_of_snapshot()
    assert second is not None and second.key == b"b"
    index.unpin(second)
    assert ready(index, b"d", 2).extent == Extent(UNIT, 2 * UNIT)
    index.unpin(a)
    index.end_snapshot()
    index.check()


def test_an_insert_looks_at_few_entries_that_the_snapshot_still_needs() -> None:
    index = index_of(3 * MAX_HURRIED)
    entries = [ready(index, i.to_bytes(2)) for i in range(3 * MAX_HURRIED)]
    index.begin_snapshot()
    assert index.reserve(b"new", UNIT, 1, KV) is None
    first = [index.next_of_snapshot() for _ in range(MAX_HURRIED + 1)]
    assert set(first[:-1]) == set(entries[:MAX_HURRIED])
    assert first[-1] is entries[MAX_HURRIED]


def test_one_snapshot_at_a_time() -> None:
    index = index_of(3)
    index.begin_snapshot()
    with pytest.raises(SnapshotError, match="being written already"):
        index.begin_snapshot()
    index.end_snapshot()
    index.begin_snapshot()


class History:
    """Random steps on an index, its bytes, and what the snapshot must find. A byte stands for a unit."""

    NUM_UNITS = 48
    NUM_KEYS = 40

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.index = index_of(self.NUM_UNITS)
        self.memory = [0] * self.NUM_UNITS
        self.number = 0
        self.known: set[HostEntry] = set()  # READY, or were
        self.writers: list[HostEntry] = []
        self.readers: list[HostEntry] = []
        self.in_hand: list[HostEntry] = []  # taken, not yet written
        self.expected: dict[HostEntry, list[int]] | None = None  # of the running snapshot
        self.found: dict[HostEntry, list[int]] = {}
        self.seen: Counter[str] = Counter()

    def bytes_of(self, entry: HostEntry) -> list[int]:
        start = entry.extent.offset // UNIT
        return self.memory[start : start + entry.extent.nbytes // UNIT]

    def step(self) -> None:
        steps = [self.insert] * 6 + [self.commit] * 6 + [self.read] * 3 + [self.release] * 3
        steps += [self.take] * 3 + [self.write] * 3 + [self.begin]
        if self.random.random() < 0.04:
            steps = [self.clear, self.cancel]
        self.random.choice(steps)()
        self.index.check()

    def insert(self) -> None:
        key = bytes([self.random.randrange(self.NUM_KEYS)])
        if self.index.holds(key):
            return
        if (entry := self.index.reserve(key, self.random.randint(1, 6) * UNIT, 1, KV)) is None:
            self.seen["refused"] += self.expected is not None
            return
        self.number += 1
        start = entry.extent.offset // UNIT
        self.memory[start : start + entry.extent.nbytes // UNIT] = [self.number] * (entry.extent.nbytes // UNIT)
        self.writers.append(entry)

    def commit(self) -> None:
        if not self.writers:
            return
        entry = self.writers.pop(self.random.randrange(len(self.writers)))
        if self.random.random() < 0.1:
            self.index.discard(entry)
        else:
            self.index.commit(entry)
            self.known.add(entry)

    def read(self) -> None:
        entry = self.index.get(bytes([self.random.randrange(self.NUM_KEYS)]))
        if entry is not None:
            self.index.pin(entry)
            self.readers.append(entry)

    def release(self) -> None:
        if self.readers:
            self.index.unpin(self.readers.pop(self.random.randrange(len(self.readers))))

    def begin(self) -> None:
        if self.expected is not None:
            return
        now_ready = {entry for entry in self.known if self.index.get(entry.key) is entry}
        self.expected, self.found = {entry: self.bytes_of(entry) for entry in now_ready}, {}
        size = self.index.begin_snapshot()
        assert size == SnapshotSize(len(now_ready), sum(entry.extent.nbytes for entry in now_ready))

    def take(self) -> None:
        if self.expected is None or len(self.in_hand) > 3:
            return
        if (entry := self.index.next_of_snapshot()) is not None:
            self.seen["taken after it left"] += self.index.get(entry.key) is not entry
            self.in_hand.append(entry)
        elif not self.in_hand:
            assert self.found == self.expected
            self.seen["complete"] += 1
            self.index.end_snapshot()
            self.expected = None

    def write(self) -> None:
        if self.in_hand:
            entry = self.in_hand.pop(0)
            assert entry not in self.found, "written twice"
            self.found[entry] = self.bytes_of(entry)
            self.index.unpin(entry)

    def clear(self) -> None:
        self.seen["cleared"] += self.expected is not None
        self.index.clear()

    def cancel(self) -> None:
        if self.expected is not None and self.random.random() < 0.3:
            self.index.end_snapshot()
            while self.in_hand:
                self.index.unpin(self.in_hand.pop())
            self.expected = None
            self.seen["cancelled"] += 1


@pytest.mark.parametrize("seed", range(12))
def test_random_histories_leave_the_image_as_it_was(seed: int) -> None:
    history = History(seed)
    for _ in range(4000):
        history.step()
    reached = ["refused", "taken after it left", "complete", "cleared", "cancelled"]
    assert all(history.seen[name] >= 3 for name in reached), history.seen
    while history.expected is not None:
        history.write()
        history.take()
    for entry in history.writers:
        history.index.commit(entry)
    for entry in history.readers:
        history.index.unpin(entry)
    history.index.clear()
    history.index.check()
    assert ready(history.index, b"all", history.NUM_UNITS).extent == Extent(0, history.NUM_UNITS * UNIT)
