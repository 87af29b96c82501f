"""Reading the host index page by page, as listings do, with other work in between."""

import random

from store.test_host import UNIT, index_of, ready, written
from vlcache_connector.store.host import HostEntry, HostIndex
from vlcache_connector.types import EntryClass


def all_of(index: HostIndex) -> list[HostEntry]:
    return index.places.page(0, len(index.places))


def test_pages_hold_all_entries_also_those_that_are_being_written() -> None:
    index = index_of(10)
    entries = [ready(index, bytes([65 + i])) for i in range(4)] + [written(index, b"w")]
    assert index.places.page(0, 2) + index.places.page(2, 2) + index.places.page(4, 2) == entries
    assert index.places.page(6, 2) == []


def test_the_place_of_an_entry_that_goes_is_taken_by_the_next() -> None:
    index = index_of(3)
    a, b, c = (ready(index, key) for key in (b"a", b"b", b"c"))
    index.forget(b)
    assert all_of(index) == [a, c]
    d = ready(index, b"d")
    assert all_of(index) == [a, d, c]
    e = ready(index, b"e")  # evicts a
    assert all_of(index) == [e, d, c]
    assert len(index.places) == 3
    index.check()


def test_what_stays_is_met_once_while_everything_else_changes() -> None:
    chance = random.Random(1)
    for _ in range(200):
        index = index_of(40)
        staying = [ready(index, bytes([number])) for number in range(20)]
        going = [ready(index, bytes([100 + number])) for number in range(20)]
        chance.shuffle(going)
        met: list[HostEntry] = []
        for start in range(0, len(index.places), 7):
            met += index.places.page(start, 7)
            for _ in range(chance.randrange(4)):
                if going:
                    index.forget(going.pop())
                    ready(index, chance.randbytes(8))
        assert len(set(met)) == len(met)
        assert set(staying) <= set(met)
        index.check()


def test_a_forgotten_entry_keeps_its_bytes_until_it_is_unpinned() -> None:
    index = index_of(1)
    entry = ready(index, b"a")
    index.pin(entry)
    index.forget(entry)
    assert index.get(b"a") is None
    assert index.used_nbytes == UNIT
    assert index.reserve(b"b", UNIT, 1, EntryClass("kv", "image")) is None
    index.unpin(entry)
    assert index.used_nbytes == 0
    index.check()


def test_used_bytes_follow_every_way_in_and_out() -> None:
    index = index_of(4)
    assert (index.used_nbytes, index.capacity_nbytes) == (0, 4 * UNIT)
    index.discard(written(index, b"a", 2))
    assert index.used_nbytes == 0
    for number in range(9):
        ready(index, bytes([number]), 2)
    assert index.used_nbytes == 4 * UNIT
    index.clear()
    assert index.used_nbytes == 0
