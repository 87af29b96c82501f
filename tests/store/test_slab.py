"""Views of entries in the slab: where they lie, what they look like, and that nothing but them changes."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from vlcache_connector.store.extents import ALIGNMENT, ExtentAllocator
from vlcache_connector.store.slab import POSITION_CHANNELS, EntryLayout, Slab, SlabBytes
from vlcache_connector.types import MAX_ORDERED, Extent, num_ordered

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NUM_TOKENS = [1, 3, 16, 41, MAX_ORDERED + 5]
GUARD = 0xA5

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_length = pytest.mark.parametrize("num_tokens", NUM_TOKENS)


def layout_of(dtype: torch.dtype) -> EntryLayout:
    """Odd sizes on purpose: no entry of it is a whole number of alignment units."""
    return EntryLayout(
        num_layers=3, num_kv_heads=2, head_dim=5, kv_dtype=dtype, embedding_width=7, embedding_dtype=dtype
    )


def slab_with_two(dtype: torch.dtype, num_tokens: int) -> tuple[Slab, Extent, Extent]:
    """A slab full of guard bytes with room for two KV entries, and their extents as the allocator gives them."""
    layout = layout_of(dtype)
    allocator = ExtentAllocator(4 * (layout.kv_nbytes(num_tokens) + ALIGNMENT))
    slab = Slab(allocator.capacity, layout)
    raw_bytes(slab.embedding(Extent(0, 1 << 40), 1)).fill_(GUARD)
    extents = [allocator.allocate(layout.kv_nbytes(num_tokens)) for _ in range(2)]
    assert extents[0] is not None
    assert extents[1] is not None
    return slab, extents[0], extents[1]


def raw_bytes(view: torch.Tensor) -> torch.Tensor:
    """All bytes of the slab that a view lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage())


def byte_range(view: torch.Tensor) -> tuple[int, int]:
    assert view.is_contiguous()
    start = int(view.storage_offset()) * view.element_size()
    return start, start + int(view.numel()) * view.element_size()


def random_bits(shape: torch.Size, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern, NaN and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    count = shape.numel() * dtype.itemsize
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@every_dtype
@every_length
def test_shapes_and_dtypes_are_the_layouts(dtype: torch.dtype, num_tokens: int) -> None:
    slab, extent, _ = slab_with_two(dtype, num_tokens)
    kv, positions = slab.kv(extent, num_tokens), slab.positions(extent, num_tokens)
    embedding = slab.embedding(extent, num_tokens)
    assert (kv.shape, kv.dtype) == ((3, 2, num_tokens, 2, 5), dtype)
    assert (positions.shape, positions.dtype) == ((POSITION_CHANNELS, num_tokens), torch.int32)
    order = slab.order(extent, num_tokens)
    assert (order.shape, order.dtype) == ((min(num_tokens, MAX_ORDERED),), torch.int32)
    assert (embedding.shape, embedding.dtype) == ((num_tokens, 7), dtype)


@every_dtype
@every_length
def test_views_of_one_entry_lie_apart_within_its_extent(dtype: torch.dtype, num_tokens: int) -> None:
    slab, _, extent = slab_with_two(dtype, num_tokens)
    kv, positions = byte_range(slab.kv(extent, num_tokens)), byte_range(slab.positions(extent, num_tokens))
    order = byte_range(slab.order(extent, num_tokens))
    assert extent.offset == kv[0]
    assert kv[1] <= positions[0]
    assert positions[1] == order[0], "order lies right behind positions"
    assert order[1] <= extent.offset + extent.nbytes
    assert kv[1] - kv[0] == slab.layout.kv_payload_nbytes(num_tokens)
    assert order[1] - extent.offset == slab.layout.kv_nbytes(num_tokens)


@every_dtype
@every_length
def test_an_embedding_fills_its_extent_as_announced(dtype: torch.dtype, num_tokens: int) -> None:
    slab, _, extent = slab_with_two(dtype, num_tokens)
    start, end = byte_range(slab.embedding(extent, num_tokens))
    assert start == extent.offset
    assert end - start == slab.layout.embedding_nbytes(num_tokens) == num_tokens * 7 * dtype.itemsize


@every_dtype
@every_length
def test_every_view_is_aligned_for_its_elements(dtype: torch.dtype, num_tokens: int) -> None:
    slab, _, extent = slab_with_two(dtype, num_tokens)
    assert byte_range(slab.kv(extent, num_tokens))[0] % ALIGNMENT == 0
    assert byte_range(slab.positions(extent, num_tokens))[0] % 64 == 0, "positions start on a cache line"
    assert byte_range(slab.order(extent, num_tokens))[0] % torch.int32.itemsize == 0


@every_dtype
def test_a_layer_is_one_contiguous_range_and_layers_follow_each_other(dtype: torch.dtype) -> None:
    slab, extent, _ = slab_with_two(dtype, 16)
    ranges = [byte_range(layer) for layer in slab.kv(extent, 16)]
    assert all(a[1] == b[0] for a, b in pairwise(ranges))


@every_dtype
@every_length
def test_what_is_written_is_read_back_bit_for_bit(dtype: torch.dtype, num_tokens: int) -> None:
    slab, first, second = slab_with_two(dtype, num_tokens)
    wanted = {}
    for seed, extent in enumerate((first, second)):
        kv = random_bits(slab.kv(extent, num_tokens).shape, dtype, seed)
        positions = random_bits(slab.positions(extent, num_tokens).shape, torch.int32, seed + 10)
        order = random_bits(slab.order(extent, num_tokens).shape, torch.int32, seed + 20)
        slab.kv(extent, num_tokens).copy_(kv)
        slab.positions(extent, num_tokens).copy_(positions)
        slab.order(extent, num_tokens).copy_(order)
        wanted[extent] = kv, positions, order
    for extent, (kv, positions, order) in wanted.items():
        assert same_bits(slab.kv(extent, num_tokens), kv)
        assert same_bits(slab.positions(extent, num_tokens), positions)
        assert same_bits(slab.order(extent, num_tokens), order)


@every_dtype
@every_length
def test_an_embedding_is_read_back_bit_for_bit(dtype: torch.dtype, num_tokens: int) -> None:
    slab, extent, _ = slab_with_two(dtype, num_tokens)
    rows = random_bits(slab.embedding(extent, num_tokens).shape, dtype, 0)
    slab.embedding(extent, num_tokens).copy_(rows)
    assert same_bits(slab.embedding(extent, num_tokens), rows)


@every_dtype
@every_length
@pytest.mark.parametrize("part", ["kv", "positions", "order", "embedding"])
def test_writing_a_view_changes_its_own_bytes_and_no_others(dtype: torch.dtype, num_tokens: int, part: str) -> None:
    slab, extent, _ = slab_with_two(dtype, num_tokens)
    view: torch.Tensor = getattr(slab, part)(extent, num_tokens)
    view.zero_()
    changed = (raw_bytes(view) != GUARD).nonzero().flatten().tolist()
    assert changed == list(range(*byte_range(view)))


def test_views_share_the_slabs_memory() -> None:
    slab, extent, _ = slab_with_two(torch.float32, 3)
    slab.kv(extent, 3).fill_(2.0)
    assert slab.kv(extent, 3).eq(2.0).all()


def test_a_view_never_reaches_beyond_its_extent() -> None:
    layout = EntryLayout(2, 2, 8, torch.bfloat16, 24, torch.bfloat16)
    slab = Slab(1 << 16, layout)
    small = Extent(0, layout.embedding_nbytes(4))
    assert slab.embedding(small, 4).shape == (4, 24)
    for view, num_tokens in ((slab.embedding, 5), (slab.kv, 1000), (slab.positions, 1000), (slab.order, 1000)):
        with pytest.raises(ValueError, match="do not fit"):
            view(small, num_tokens)
    exact, short = Extent(0, layout.kv_nbytes(4)), Extent(0, layout.kv_nbytes(4) - 1)
    assert slab.order(exact, 4).shape == (4,) and slab.positions(short, 4).shape == (3, 4)
    with pytest.raises(ValueError, match="do not fit"):
        slab.order(short, 4)
    with pytest.raises(ValueError, match="do not fit"):
        slab.embedding(Extent((1 << 16) - 10, 1 << 12), 4)


# -- the same memory in another process --------------------------------------------------------------------------------

_OTHER = """
import sys
from vlcache_connector.store.slab import EntryLayout, SlabBytes
from vlcache_connector.types import Extent
import torch
layout = EntryLayout(3, 2, 5, torch.bfloat16, 7, torch.bfloat16)
slab = SlabBytes.find(layout, sys.argv[1], [int(sys.argv[2])])
for part in slab.parts(Extent(0, 1 << 16), "kv", 3):
    part.buffer[:] = bytes(255 - byte for byte in part.buffer)
"""


@every_dtype
@every_length
def test_parts_are_the_bytes_of_the_views_in_their_order(dtype: torch.dtype, num_tokens: int) -> None:
    layout = layout_of(dtype)
    slab = Slab(1 << 17, layout, "vlcache-test-parts")
    shared = SlabBytes.find(layout, "vlcache-test-parts", ["self"])
    extent = Extent(256, 1 << 16)
    views = [*slab.kv(extent, num_tokens), slab.positions(extent, num_tokens), slab.order(extent, num_tokens)]
    for number, view in enumerate(views):
        raw_view(view).copy_(random_bits(view.shape, view.dtype, number).view(torch.uint8).flatten())
    parts = shared.parts(extent, "kv", num_tokens)
    assert [part.name for part in parts] == ["layer.0", "layer.1", "layer.2", "positions", "order"]
    assert [part.dtype for part in parts[3:]] == ["I32", "I32"]
    for part, view in zip(parts, views, strict=True):
        assert part.shape == tuple(view.shape)
        assert bytes(part.buffer) == bytes(raw_view(view).tolist())
    rows = slab.embedding(extent, num_tokens)
    (embedding,) = shared.parts(extent, "embedding", num_tokens)
    assert (embedding.name, embedding.shape) == ("embedding", tuple(rows.shape))
    assert bytes(embedding.buffer) == bytes(raw_view(rows).tolist())


@every_length
def test_the_order_is_read_as_numbers_where_entries_are_read_as_bytes(num_tokens: int) -> None:
    layout = layout_of(torch.bfloat16)
    slab = Slab(1 << 17, layout, "vlcache-test-order")
    shared = SlabBytes.find(layout, "vlcache-test-order", ["self"])
    extents = [Extent(start, layout.kv_nbytes(num_tokens)) for start in (0, 1 << 16)]
    wanted = [torch.randperm(num_tokens, dtype=torch.int32)[:MAX_ORDERED] for _ in extents]
    for extent, order in zip(extents, wanted, strict=True):
        slab.order(extent, num_tokens).copy_(order)
    for extent, order in zip(extents, wanted, strict=True):
        assert list(shared.order(extent, num_tokens)) == order.tolist()
        assert list(shared.order(extent, num_tokens)[:3]) == order[:3].tolist()
    with pytest.raises(ValueError, match="do not fit"):
        shared.order(Extent(0, layout.kv_nbytes(num_tokens) - 1), num_tokens)
    with pytest.raises(ValueError, match="do not fit"):
        shared.order(Extent((1 << 17) - 64, 1 << 16), num_tokens)


def test_an_entry_holds_the_order_of_so_many_tokens_at_most() -> None:
    layout = layout_of(torch.bfloat16)
    lengths = [1, MAX_ORDERED - 1, MAX_ORDERED, MAX_ORDERED + 1, 16384]
    assert [num_ordered(length) for length in lengths] == [1, 127, 128, 128, 128]
    assert [layout.kv_nbytes(n) - layout.order_start(n) for n in lengths] == [4, 508, 512, 512, 512]


def raw_view(view: torch.Tensor) -> torch.Tensor:
    return view.reshape(-1).view(torch.uint8)


def test_another_process_of_the_user_finds_a_slab_by_its_name_and_shares_its_bytes() -> None:
    slab = Slab(1 << 16, layout_of(torch.bfloat16), "vlcache-test-shared")
    kv = slab.kv(Extent(0, 1 << 16), 3)
    kv.zero_()
    command = [sys.executable, "-c", _OTHER, "vlcache-test-shared", str(os.getpid())]
    subprocess.run(command, check=True, timeout=120)
    assert bytes(raw_view(kv).tolist()) == b"\xff" * kv.numel() * 2


def test_a_slab_that_nobody_holds_is_not_found() -> None:
    layout = layout_of(torch.bfloat16)
    slab = Slab(4096, layout, "vlcache-test-gone")
    SlabBytes.find(layout, "vlcache-test-gone", [os.getpid()])
    del slab
    with pytest.raises(FileNotFoundError, match="vlcache-test-gone"):
        SlabBytes.find(layout, "vlcache-test-gone", [os.getpid(), 2**22 - 1])


@pytest.mark.parametrize("extent", [Extent(0, 64), Extent(4096 - 256, 512)])
def test_parts_never_reach_beyond_an_extent_or_the_slab(extent: Extent) -> None:
    layout = layout_of(torch.bfloat16)
    _slab = Slab(4096, layout, "vlcache-test-bounds")
    shared = SlabBytes.find(layout, "vlcache-test-bounds", ["self"])
    for kind in ("kv", "embedding"):
        with pytest.raises(ValueError, match="do not fit"):
            shared.parts(extent, kind, 41)
