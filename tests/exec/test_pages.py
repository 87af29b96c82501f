"""Pages over layouts that this file invents: write then read is the identity, and nothing else changes.

A layout is a function from (block, K or V, token, head, dim) to a place in the cache tensor; its cache update and the
oracle of every test follow that function element by element.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from exec import paged_rows
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.types import Run

BLOCK_SIZE, HEADS, DIM, NUM_BLOCKS = 4, 2, 6, 9
BLOCK_IDS = [
    5,
    2,
    8,
    0,
]  # of the request under test, 16 tokens; not in order, first and last block of the cache included
NUM_TOKENS = BLOCK_SIZE * len(BLOCK_IDS)
GUARD = -7.0

Index = tuple[torch.Tensor, ...]
Locate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Index]


@dataclass(frozen=True)
class Layout:
    """`locate(block, kv, token, head, dim)` is the index of an element in a cache that `allocate(num_blocks)` makes."""

    allocate: Callable[[int, torch.dtype], torch.Tensor]
    locate: Locate
    is_affine: bool
    sizes: tuple[int, int, int] = (BLOCK_SIZE, HEADS, DIM)

    def where(self, slots: torch.Tensor) -> Index:
        """Index of all elements [2, n, heads, dim] of the tokens at `slots` [n]."""
        block_size, heads, dim = self.sizes
        kv, slot, head, d = torch.meshgrid(
            torch.arange(2), slots, torch.arange(heads), torch.arange(dim), indexing="ij"
        )
        return self.locate(slot // block_size, kv, slot % block_size, head, d)

    def update(self, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        cache[self.where(slots)] = torch.stack((keys, values))

    def pages(self, cache: torch.Tensor) -> Pages:
        return Pages([PagedLayer("layer 0", cache, self.update)], *self.sizes)


def unpacked(sizes: tuple[int, int, int] = (BLOCK_SIZE, HEADS, DIM)) -> Layout:
    """[blocks, heads, block, 2 * dim]: keys and values of a token side by side."""
    block_size, heads, dim = sizes

    def locate(b: torch.Tensor, kv: torch.Tensor, t: torch.Tensor, h: torch.Tensor, d: torch.Tensor) -> Index:
        return b, h, t, kv * dim + d

    return Layout(
        lambda n, dtype: torch.empty(n, heads, block_size, 2 * dim, dtype=dtype), locate, is_affine=True, sizes=sizes
    )


def halves(sizes: tuple[int, int, int] = (BLOCK_SIZE, HEADS, DIM)) -> Layout:
    """[blocks, 2, block, heads, dim]: keys, then values."""
    block_size, heads, dim = sizes
    return Layout(
        lambda n, dtype: torch.empty(n, 2, block_size, heads, dim, dtype=dtype),
        lambda b, kv, t, h, d: (b, kv, t, h, d),
        is_affine=True,
        sizes=sizes,
    )


def values_first() -> Layout:
    """Values before keys."""
    return Layout(
        lambda n, dtype: torch.empty(n, 2, BLOCK_SIZE, HEADS, DIM, dtype=dtype),
        lambda b, kv, t, h, d: (b, 1 - kv, t, h, d),
        is_affine=True,
    )


def transposed_keys() -> Layout:
    """[blocks, heads, 2, block * dim]: keys dimension by dimension, values token by token."""

    def locate(b: torch.Tensor, kv: torch.Tensor, t: torch.Tensor, h: torch.Tensor, d: torch.Tensor) -> Index:
        return b, h, kv, torch.where(kv == 0, d * BLOCK_SIZE + t, t * DIM + d)

    return Layout(lambda n, dtype: torch.empty(n, HEADS, 2, BLOCK_SIZE * DIM, dtype=dtype), locate, is_affine=True)


def falling_heads() -> Layout:
    """The last head first."""
    return Layout(
        lambda n, dtype: torch.empty(n, 2, HEADS, BLOCK_SIZE, DIM, dtype=dtype),
        lambda b, kv, t, h, d: (b, kv, HEADS - 1 - h, t, d),
        is_affine=True,
    )


def packed() -> Layout:
    """[blocks, everything]: elements of a block in random order."""
    count = 2 * BLOCK_SIZE * HEADS * DIM
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).view(2, BLOCK_SIZE, HEADS, DIM)
    return Layout(
        lambda n, dtype: torch.empty(n, count, dtype=dtype),
        lambda b, kv, t, h, d: (b, order[kv, t, h, d]),
        is_affine=False,
    )


def packed_keys() -> Layout:
    """[blocks, heads, 2, block * dim]: keys in groups of two tokens, dimension by dimension, values as they are."""

    def locate(b: torch.Tensor, kv: torch.Tensor, t: torch.Tensor, h: torch.Tensor, d: torch.Tensor) -> Index:
        grouped = (t // 2) * 2 * DIM + d * 2 + t % 2
        return b, h, kv, torch.where(kv == 0, grouped, t * DIM + d)

    return Layout(lambda n, dtype: torch.empty(n, HEADS, 2, BLOCK_SIZE * DIM, dtype=dtype), locate, is_affine=False)


def transposed_storage() -> Layout:
    """Blocks first in the tensor, K and V first in memory."""
    return Layout(
        lambda n, dtype: torch.empty(2, n, BLOCK_SIZE, HEADS, DIM, dtype=dtype).transpose(0, 1),
        lambda b, kv, t, h, d: (b, kv, t, h, d),
        is_affine=True,
    )


def permuted_storage() -> Layout:
    """Blocks first in the tensor, last in memory."""
    return Layout(
        lambda n, dtype: torch.empty(2, HEADS, BLOCK_SIZE, DIM, n, dtype=dtype).permute(4, 0, 2, 1, 3),
        lambda b, kv, t, h, d: (b, kv, t, h, d),
        is_affine=True,
    )


def padded_storage() -> Layout:
    """A slice of a wider tensor: gaps between the blocks, and inside them."""
    return Layout(
        lambda n, dtype: torch.empty(n + 3, 3, BLOCK_SIZE, HEADS, DIM + 5, dtype=dtype)[2:-1, :2, :, :, 1 : DIM + 1],
        lambda b, kv, t, h, d: (b, kv, t, h, d),
        is_affine=True,
    )


LAYOUTS: dict[str, Layout] = {
    "unpacked": unpacked(),
    "halves": halves(),
    "values_first": values_first(),
    "transposed_keys": transposed_keys(),
    "falling_heads": falling_heads(),
    "packed": packed(),
    "packed_keys": packed_keys(),
    "transposed_storage": transposed_storage(),
    "permuted_storage": permuted_storage(),
    "padded_storage": padded_storage(),
    "one_head": unpacked((BLOCK_SIZE, 1, DIM)),
    "one_dimension": halves((BLOCK_SIZE, HEADS, 1)),
    "one_token": unpacked((1, HEADS, DIM)),
    "one_of_each": halves((1, 1, 1)),
    "more_than_256_elements": unpacked((16, 2, 64)),
    "more_than_65536_elements": unpacked((32, 8, 160)),
}
LARGE = {"more_than_256_elements", "more_than_65536_elements"}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_small_layout = pytest.mark.parametrize(
    "layout", [v for k, v in LAYOUTS.items() if k not in LARGE], ids=[k for k in LAYOUTS if k not in LARGE]
)


def cache_of(layout: Layout, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return layout.allocate(NUM_BLOCKS, dtype).fill_(GUARD)


def random_rows(layout: Layout, num_tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Keys and values [2, tokens, heads, dim] of every bit pattern, NaN and infinities included."""
    _, heads, dim = layout.sizes
    shape = (2, num_tokens, heads, dim * dtype.itemsize)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def slots_by_a_loop(block_ids: list[int], positions: range, block_size: int) -> torch.Tensor:
    return torch.tensor([block_ids[p // block_size] * block_size + p % block_size for p in positions])


def ranges_of(num_tokens: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(num_tokens + 1), 2))


def write(pages: Pages, rows: torch.Tensor, start: int, layer: int = 0) -> None:
    paged_rows.write(pages, BLOCK_IDS, rows, start, layer)


def read(pages: Pages, start: int, end: int, layer: int = 0) -> torch.Tensor:
    return paged_rows.read(pages, BLOCK_IDS, start, end, layer)


# -- reading and writing ----------------------------------------------------------------------------------------------


@every_small_layout
def test_every_range_that_is_written_is_read_back_bit_for_bit_and_nothing_else_changes(layout: Layout) -> None:
    """All ranges: inside a block, up to its end, across blocks, whole blocks, the last token of the last block."""
    block_size = layout.sizes[0]
    cache = cache_of(layout)
    pages, everything = layout.pages(cache), torch.arange(NUM_BLOCKS * block_size)
    for start, end in ranges_of(block_size * len(BLOCK_IDS)):
        cache.fill_(GUARD)
        rows = random_rows(layout, end - start, seed=start)
        write(pages, rows, start)
        assert same_bits(read(pages, start, end), rows)
        written = slots_by_a_loop(BLOCK_IDS, range(start, end), block_size)
        assert same_bits(cache[layout.where(written)], rows), "not where the layout says"
        untouched = everything[~torch.isin(everything, written)]
        assert bool((cache[layout.where(untouched)] == GUARD).all())


@every_layout
def test_what_the_engine_wrote_is_read(layout: Layout) -> None:
    """The cache is filled by index, not by `write`; ranges are read at random."""
    block_size = layout.sizes[0]
    cache = cache_of(layout)
    rows = random_rows(layout, NUM_BLOCKS * block_size)
    cache[layout.where(torch.arange(NUM_BLOCKS * block_size))] = rows
    pages, rng = layout.pages(cache), random.Random(0)
    ranges = ranges_of(block_size * len(BLOCK_IDS)) if block_size <= BLOCK_SIZE else []
    for start, end in rng.sample(ranges, min(20, len(ranges))) or [(0, 17), (31, 33), (63, 64), (5, 64)]:
        slots = slots_by_a_loop(BLOCK_IDS, range(start, end), block_size)
        assert same_bits(read(pages, start, end), rows[:, slots])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["unpacked", "packed"])
def test_every_dtype_of_a_cache_is_read_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    layout = LAYOUTS[name]
    pages = layout.pages(cache_of(layout, dtype))
    rows = random_rows(layout, 11, dtype)
    write(pages, rows, 3)
    assert pages.dtype == dtype
    assert same_bits(read(pages, 3, 14), rows)


def test_each_layer_has_its_own_pages() -> None:
    layout = LAYOUTS["halves"]
    caches = [cache_of(layout) for _ in range(3)]
    layers = [PagedLayer(f"layer {i}", cache, layout.update) for i, cache in enumerate(caches)]
    pages = Pages(layers, *layout.sizes)
    rows = [random_rows(layout, 5, seed=number) for number in range(3)]
    for number in (2, 0, 1):
        write(pages, rows[number], 2, number)
    assert all(same_bits(read(pages, 2, 7, number), rows[number]) for number in range(3))


def test_slots_are_block_times_size_plus_offset() -> None:
    pages = LAYOUTS["halves"].pages(cache_of(LAYOUTS["halves"]))
    slots = pages.slots(BLOCK_IDS, [Run(3, 6), Run(8, 9), Run(15, 16)], 2, NUM_TOKENS - 2)
    known = {p: BLOCK_IDS[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in (3, 4, 5, 8, 15)}
    assert slots.tolist() == [known.get(p, -1) for p in range(2, NUM_TOKENS)]
    assert slots.dtype == torch.int64


@pytest.mark.parametrize("runs", [[], [Run(4, 4)], [Run(7, 7), Run(12, 12)]])
def test_without_runs_no_token_has_a_slot(runs: list[Run]) -> None:
    slots = LAYOUTS["halves"].pages(cache_of(LAYOUTS["halves"])).slots(BLOCK_IDS, runs, 4, 9)
    assert slots.tolist() == [-1] * 9 and slots.dtype == torch.int64


def test_slots_do_not_depend_on_the_order_of_runs_and_empty_ones_give_none() -> None:
    pages = LAYOUTS["halves"].pages(cache_of(LAYOUTS["halves"]))
    runs = [Run(9, 12), Run(6, 6), Run(3, 5), Run(15, 15)]
    expected = pages.slots(BLOCK_IDS, [Run(3, 5), Run(9, 12)], 3, 10)
    assert torch.equal(pages.slots(BLOCK_IDS, runs, 3, 10), expected)
    assert (expected >= 0).nonzero().flatten().tolist() == [0, 1, 6, 7, 8]


# -- what is learnt of a layout ---------------------------------------------------------------------------------------


@every_layout
def test_layouts_that_are_strided_are_recognised_and_others_are_not_mistaken_for_them(layout: Layout) -> None:
    assert (layout.pages(cache_of(layout)).layout.order is None) == layout.is_affine


@every_small_layout
def test_learning_a_layout_leaves_the_pages_alone(layout: Layout) -> None:
    cache = cache_of(layout)
    layout.pages(cache)
    assert bool((cache == GUARD).all())


def test_all_layouts_read_the_same_rows_alike() -> None:
    layouts = [layout for layout in LAYOUTS.values() if layout.sizes == (BLOCK_SIZE, HEADS, DIM)]
    assert {layout.is_affine for layout in layouts} == {True, False}
    rows = random_rows(layouts[0], NUM_TOKENS)
    for start, end in [(0, NUM_TOKENS), (1, 3), (3, 13), (15, 16)]:
        for layout in layouts:
            pages = layout.pages(cache_of(layout))
            write(pages, rows, 0)
            assert same_bits(read(pages, start, end), rows[:, start:end])


def one_location(layout: Layout, kept: Callable[[Index], Index]) -> Layout:
    """A layout that places elements where `kept` says instead."""
    return Layout(layout.allocate, lambda *at: kept(layout.locate(*at)), layout.is_affine, layout.sizes)


BROKEN: dict[str, Layout] = {
    "values overwrite keys": one_location(halves(), lambda at: (at[0], at[1] * 0, *at[2:])),
    "one dimension is dropped": one_location(halves(), lambda at: (*at[:4], at[4].clamp(max=DIM - 2))),
    "heads share a place": one_location(halves(), lambda at: (*at[:3], at[3] * 0, at[4])),
}


@pytest.mark.parametrize("layout", BROKEN.values(), ids=BROKEN)
def test_a_layout_that_loses_elements_is_refused_by_name(layout: Layout) -> None:
    with pytest.raises(RuntimeError, match=r"layer 0.*layout is unknown"):
        layout.pages(cache_of(layout))


def test_a_cache_that_changes_values_is_refused() -> None:
    layout = halves()

    def halve(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        layout.update(keys / 2, values / 2, cache, slots)

    with pytest.raises(RuntimeError, match="layout is unknown"):
        Pages([PagedLayer("scaled", cache_of(layout), halve)], *layout.sizes)


def test_a_cache_wider_than_its_elements_is_refused() -> None:
    """A contiguous block with room to spare holds places that no element owns."""
    layout = Layout(
        lambda n, dtype: torch.empty(n, 3, BLOCK_SIZE, HEADS, DIM, dtype=dtype),
        lambda b, kv, t, h, d: (b, kv, t, h, d),
        is_affine=True,
    )
    with pytest.raises(RuntimeError):
        layout.pages(cache_of(layout))
