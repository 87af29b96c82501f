"""The allocator of extents against a list with one owner per unit."""

import random

import pytest

from vlcache_connector.store.extents import ALIGNMENT, ExtentAllocator
from vlcache_connector.types import Extent

NUM_UNITS = 48


class UnitMap:
    """First fit, read off a list: the lowest place where enough units in a row have no owner."""

    def __init__(self, num_units: int) -> None:
        self.owners: list[Extent | None] = [None] * num_units

    def first_fit(self, nbytes: int) -> Extent | None:
        count = (nbytes + ALIGNMENT - 1) // ALIGNMENT
        for start in range(len(self.owners) - count + 1):
            if not any(self.owners[start : start + count]):
                return Extent(start * ALIGNMENT, count * ALIGNMENT)
        return None

    def units(self, extent: Extent) -> range:
        return range(extent.offset // ALIGNMENT, (extent.offset + extent.nbytes) // ALIGNMENT)

    def take(self, extent: Extent) -> None:
        for unit in self.units(extent):
            assert self.owners[unit] is None, f"{extent} overlaps {self.owners[unit]}"
            self.owners[unit] = extent

    def give_back(self, extent: Extent) -> None:
        for unit in self.units(extent):
            assert self.owners[unit] == extent
            self.owners[unit] = None


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_random_steps_agree_with_a_map_of_units(seed: int) -> None:
    rng = random.Random(seed)
    allocator, units = ExtentAllocator(NUM_UNITS * ALIGNMENT + seed * 50), UnitMap(NUM_UNITS)
    held: list[Extent] = []
    refused = 0
    for step in range(3000):
        wants_more = rng.random() < (0.7 if step // 100 % 2 else 0.35)  # filling up and draining in turn
        if wants_more:
            nbytes = rng.choice([1, 255, 256, 257, 1024, rng.randrange(1, 9 * ALIGNMENT)])
            expected = units.first_fit(nbytes)
            extent = allocator.allocate(nbytes)
            assert extent == expected
            if extent is None:
                refused += 1
            else:
                units.take(extent)
                held.append(extent)
        elif held:
            extent = held.pop(rng.randrange(len(held)))
            allocator.free(extent)
            units.give_back(extent)
        assert allocator.num_free == units.owners.count(None) * ALIGNMENT
    assert refused > 50, "the slab was never full"
    for extent in held:
        allocator.free(extent)
    assert allocator.allocate(allocator.capacity) == Extent(0, allocator.capacity), "free ranges were not merged"


@pytest.mark.parametrize("nbytes", [1, 255, 256, 257, 1000])
def test_extents_are_aligned_and_hold_what_was_asked_for(nbytes: int) -> None:
    allocator = ExtentAllocator(100 * ALIGNMENT)
    for _ in range(5):
        extent = allocator.allocate(nbytes)
        assert extent is not None
        assert extent.offset % ALIGNMENT == extent.nbytes % ALIGNMENT == 0
        assert nbytes <= extent.nbytes < nbytes + ALIGNMENT


def test_capacity_is_rounded_down_to_whole_units() -> None:
    allocator = ExtentAllocator(3 * ALIGNMENT - 1)
    assert allocator.capacity == allocator.num_free == 2 * ALIGNMENT
    assert allocator.allocate(2 * ALIGNMENT + 1) is None
    assert allocator.allocate(2 * ALIGNMENT) == Extent(0, 2 * ALIGNMENT)


@pytest.mark.parametrize("capacity", [0, 1, ALIGNMENT - 1])
def test_a_slab_below_one_unit_holds_nothing(capacity: int) -> None:
    allocator = ExtentAllocator(capacity)
    assert (allocator.capacity, allocator.num_free) == (0, 0)
    assert allocator.allocate(1) is None


def filled(count: int) -> tuple[ExtentAllocator, list[Extent]]:
    allocator = ExtentAllocator(count * ALIGNMENT)
    extents = [allocator.allocate(ALIGNMENT) for _ in range(count)]
    assert allocator.num_free == 0
    return allocator, [extent for extent in extents if extent is not None]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_neighbours_merge_in_whatever_order_they_are_freed(order: tuple[int, ...]) -> None:
    allocator, extents = filled(3)
    for number in order:
        allocator.free(extents[number])
    assert allocator.allocate(3 * ALIGNMENT) == Extent(0, 3 * ALIGNMENT)


def test_free_bytes_that_do_not_touch_are_not_one_range() -> None:
    allocator, extents = filled(3)
    allocator.free(extents[0])
    allocator.free(extents[2])
    assert allocator.num_free == 2 * ALIGNMENT
    assert allocator.allocate(2 * ALIGNMENT) is None


@pytest.mark.parametrize("freed_before", [(), (0,), (2,), (0, 2)])
def test_freeing_twice_is_caught(freed_before: tuple[int, ...]) -> None:
    allocator, extents = filled(3)
    for number in (*freed_before, 1):
        allocator.free(extents[number])
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(extents[1])


def test_freeing_half_of_what_is_free_is_caught() -> None:
    allocator = ExtentAllocator(4 * ALIGNMENT)
    extent = allocator.allocate(2 * ALIGNMENT)
    assert extent is not None
    allocator.free(extent)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(Extent(ALIGNMENT, ALIGNMENT))
