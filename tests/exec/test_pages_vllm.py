"""Pages over the cache update of vLLM's own CPU attention, as `engine/kv_worker.py` calls it.

A file of its own, because importing vLLM takes seconds.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exec.paged_rows import read, write
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.kernels.ops import Strides
from vlcache_connector.types import Run

HEADS, DIM, NUM_BLOCKS = 2, 64, 6
BLOCK_IDS = [4, 1, 5, 0]

# (instruction set of the attention kernel, which decides the order of elements; block size that it needs)
every_kernel = pytest.mark.parametrize(("isa", "block_size"), [("vec", 32), ("vec16", 16), ("vec16", 48)])
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture(scope="module")
def cpu_attn() -> Any:
    reason = "runs where vLLM with its CPU backend is installed"
    return pytest.importorskip("vllm.v1.attention.backends.cpu_attn", reason=reason)


def paged_layer(cpu_attn: Any, cache: torch.Tensor, isa: str) -> PagedLayer:
    """The layer's own update; attention and its implementation reduced to the attributes that the update reads."""
    layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    impl = SimpleNamespace(attn_type=cpu_attn.AttentionType.DECODER, kv_cache_dtype="auto")

    def update(keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
        cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update(impl, layer, keys, values, pages, slots)

    return PagedLayer(isa, cache, update)


def cache_of(block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Pages as vLLM shapes them for this backend, every bit pattern in them."""
    shape = (NUM_BLOCKS, HEADS, block_size, 2 * DIM * dtype.itemsize)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).view(dtype)


def random_rows(num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, num_tokens, HEADS, DIM, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)


def ranges_of(block_size: int) -> list[tuple[int, int]]:
    """Inside a block, one token, across blocks, whole blocks, up to the end of the last block."""
    end = block_size * len(BLOCK_IDS)
    return [
        (3, 7),
        (0, 1),
        (block_size - 1, block_size),
        (block_size - 1, block_size + 1),
        (5, 2 * block_size + 3),
        (block_size, 3 * block_size),
        (end - 1, end),
        (0, end),
    ]


@every_kernel
@every_dtype
def test_what_is_written_through_the_engines_update_is_read_back_bit_for_bit(
    cpu_attn: Any, isa: str, block_size: int, dtype: torch.dtype
) -> None:
    pages = Pages([paged_layer(cpu_attn, cache_of(block_size, dtype), isa)], block_size, HEADS, DIM)
    for start, end in ranges_of(block_size):
        rows = random_rows(end - start, dtype)
        write(pages, BLOCK_IDS, rows, start)
        assert torch.equal(read(pages, BLOCK_IDS, start, end), rows), (start, end)


@every_kernel
@every_dtype
def test_no_other_element_changes(cpu_attn: Any, isa: str, block_size: int, dtype: torch.dtype) -> None:
    """Into pages of NaN: afterwards there are as many numbers as were written. (That they are right: test above.)"""
    cache = cache_of(block_size, dtype)
    pages = Pages([paged_layer(cpu_attn, cache, isa)], block_size, HEADS, DIM)
    for start, end in ranges_of(block_size):
        cache.fill_(torch.nan)
        rows = random_rows(end - start, dtype)
        write(pages, BLOCK_IDS, rows, start)
        is_number = ~cache.isnan()
        assert int(is_number.sum()) == rows.numel()
        blocks = is_number.flatten(1).any(dim=1).nonzero().flatten().tolist()
        slots = pages.slots(BLOCK_IDS, [Run(start, end)], start, end - start).tolist()
        assert blocks == sorted({slot // block_size for slot in slots})


@every_kernel
@every_dtype
def test_the_layout_of_this_engine_is_strides_without_a_table(
    cpu_attn: Any, isa: str, block_size: int, dtype: torch.dtype
) -> None:
    """Keys dimension by dimension, values token by token: only AMX packs them in another way."""
    layout = Pages([paged_layer(cpu_attn, cache_of(block_size, dtype), isa)], block_size, HEADS, DIM).layout
    assert layout.order is None
    assert layout.keys == Strides(0, 1, 2 * block_size * DIM, block_size)
    assert layout.values == Strides(block_size * DIM, DIM, 2 * block_size * DIM, 1)


@every_kernel
def test_a_read_of_the_whole_cache_holds_every_element_of_it_once(cpu_attn: Any, isa: str, block_size: int) -> None:
    """Numbers 0 .. n - 1 in the cache, whatever their order, are the numbers that a read gives."""
    count = HEADS * block_size * 2 * DIM
    cache = torch.arange(count, dtype=torch.float32).view(1, HEADS, block_size, 2 * DIM)
    pages = Pages([paged_layer(cpu_attn, cache, isa)], block_size, HEADS, DIM)
    assert torch.equal(read(pages, [0], 0, block_size).flatten().sort().values, cache.flatten())
