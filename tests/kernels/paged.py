"""Paged caches of every layout for tests of the operations, with memory of their own to look at.

A layout is said twice: as strides or a table, which the operations get, and as the way in which a person would index
the cache tensor, which the oracles use. All memory of a cache, its neighbourhood included, is filled with random bits,
and tests compare all of it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlcache_connector.kernels.ops import PageLayout, Strides

Index = tuple[torch.Tensor | int, ...]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
_GUARD = 64  # elements before and behind each cache


@dataclass(frozen=True, slots=True)
class Sizes:
    layers: int = 2
    tokens: int = 13
    heads: int = 3
    dim: int = 20
    num_blocks: int = 5
    block_size: int = 4

    @property
    def entry_shape(self) -> tuple[int, int, int, int, int]:
        return self.layers, 2, self.tokens, self.heads, self.dim


@dataclass(frozen=True, slots=True)
class Form:
    """A page layout for some sizes. `view` makes the cache from the shape `base` of its memory; `element` says how
    (block, K or V, offset, head, dim) are found in the cache tensor.
    """

    base: tuple[int, ...]
    view: Callable[[torch.Tensor], torch.Tensor]
    element: Callable[[Index], Index]
    strides: tuple[Strides, Strides] | None  # of keys and of values
    order: torch.Tensor | None = None

    def layout(self, block_size: int, device: torch.device) -> PageLayout:
        keys, values = self.strides or (None, None)
        return PageLayout(block_size, keys, values, None if self.order is None else self.order.to(device))


def alike(kv: int, token: int, head: int, dim: int, origin: int = 0) -> tuple[Strides, Strides]:
    """Values lie as keys do, `kv` elements further on."""
    return Strides(origin, token, head, dim), Strides(origin + kv, token, head, dim)


def _engine(s: Sizes) -> Form:
    """K and V side by side in the last dimension."""
    b, h, n, d = s.num_blocks, s.heads, s.block_size, s.dim
    return Form((b, h, n, 2 * d), _same, lambda i: (i[0], i[3], i[2], i[1] * d + i[4]), alike(d, 2 * d, n * 2 * d, 1))


def _kv_then_tokens(s: Sizes) -> Form:
    b, h, n, d = s.num_blocks, s.heads, s.block_size, s.dim
    return Form((b, 2, n, h, d), _same, lambda i: i, alike(n * h * d, h * d, d, 1))


def _token_major(s: Sizes) -> Form:
    b, h, n, d = s.num_blocks, s.heads, s.block_size, s.dim
    return Form((b, n, 2, h, d), _same, lambda i: (i[0], i[2], i[1], i[3], i[4]), alike(h * d, 2 * h * d, d, 1))


def _kv_outside(s: Sizes) -> Form:
    """All keys of a layer, then all its values."""
    b, h, n, d = s.num_blocks, s.heads, s.block_size, s.dim
    return Form((2, b, n, h, d), lambda t: t.transpose(0, 1), lambda i: i, alike(b * n * h * d, h * d, d, 1))


def _with_gaps(s: Sizes) -> Form:
    """A view that starts and ends inside its memory in every dimension."""
    b, h, n, d = s.num_blocks, s.heads, s.block_size, s.dim
    row, head = 2 * d + 5, (n + 2) * (2 * d + 5)
    return Form(
        (b + 2, h + 1, n + 2, row),
        lambda t: t[1:-1, 1:, 1:-1, 3:-2],
        lambda i: (i[0], i[3], i[2], i[1] * d + i[4]),
        alike(d, row, head, 1),
    )


def _dim_strided(s: Sizes) -> Form:
    """The tokens of a dimension lie side by side."""
    b, h, n, d = s.num_blocks, s.heads, s.block_size, s.dim
    return Form((b, 2, h, d, n), _same, lambda i: (i[0], i[1], i[3], i[4], i[2]), alike(h * d * n, 1, d * n, n))


def _keys_transposed(s: Sizes) -> Form:
    """Of a head its keys, dimension by dimension, then its values: vLLM's CPU attention without AMX."""
    n, d = s.block_size, s.dim

    def element(i: Index) -> Index:
        _, kv, token, head, dim = i
        return i[0], head, torch.where(torch.as_tensor(kv) == 0, dim * n + token, n * d + token * d + dim)

    keys, values = Strides(0, 1, 2 * n * d, n), Strides(n * d, d, 2 * n * d, 1)
    return Form((s.num_blocks, s.heads, 2 * n * d), _same, element, (keys, values))


def _values_transposed(s: Sizes) -> Form:
    """Values first, dimension by dimension, then keys, their dimensions in falling order."""
    n, d = s.block_size, s.dim

    def element(i: Index) -> Index:
        _, kv, token, head, dim = i
        return i[0], head, torch.where(torch.as_tensor(kv) == 1, dim * n + token, n * d + token * d + d - 1 - dim)

    keys, values = Strides(n * d + d - 1, d, 2 * n * d, -1), Strides(0, 1, 2 * n * d, n)
    return Form((s.num_blocks, s.heads, 2 * n * d), _same, element, (keys, values))


def _backwards(s: Sizes) -> Form:
    """Heads and tokens in falling order."""
    b, h, n, d = s.num_blocks, s.heads, s.block_size, s.dim
    strides = alike(n * h * d, -h * d, -d, 1, origin=(n * h - 1) * d)
    return Form((b, 2, n, h, d), _same, lambda i: (i[0], i[1], n - 1 - i[2], h - 1 - i[3], i[4]), strides)


def _packed(s: Sizes) -> Form:
    """Any order at all, through a table."""
    count = 2 * s.block_size * s.heads * s.dim
    order = torch.randperm(count, generator=torch.Generator().manual_seed(7)).to(torch.int32)
    table = order.view(2, s.block_size, s.heads, s.dim)
    return Form((s.num_blocks, count), _same, lambda i: (i[0], table[i[1:]].long()), None, order)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


FORMS = {
    "engine": _engine,
    "kv_then_tokens": _kv_then_tokens,
    "token_major": _token_major,
    "kv_outside": _kv_outside,
    "with_gaps": _with_gaps,
    "dim_strided": _dim_strided,
    "keys_transposed": _keys_transposed,
    "values_transposed": _values_transposed,
    "backwards": _backwards,
    "packed": _packed,
}


@dataclass(frozen=True, slots=True)
class Paged:
    """The caches of all layers. `memory` holds each cache's bytes and more of them on both sides."""

    form: Form
    memory: list[torch.Tensor]
    caches: list[torch.Tensor]
    layout: PageLayout
    sizes: Sizes

    def copy_of_memory(self) -> list[torch.Tensor]:
        return [memory.clone() for memory in self.memory]

    def with_rows(self, layer: int, kept: torch.Tensor, slots: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """Oracle: the memory of a layer after rows `bits` [2, tokens, heads, dim] (see `as_bits`) were put into
        `slots`, for the tokens `kept`. Works on a copy, by indexing.
        """
        memory = self.memory[layer].cpu().clone()
        cache = as_bits(_cache_in(memory, self.form, self.caches[0].dtype))
        cache[self.form.element(self._elements(kept, slots))] = bits[:, kept]
        return memory

    def rows(self, layer: int, kept: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Oracle: rows [2, kept tokens, heads, dim] of the pages, by indexing; of the type of the pages."""
        cache = self.caches[layer].cpu()
        return as_bits(cache)[self.form.element(self._elements(kept, slots))].view(cache.dtype)

    def _elements(self, kept: torch.Tensor, slots: torch.Tensor) -> Index:
        """(block, K or V, offset, head, dim) of elements [2, kept, heads, dim]."""
        slots = slots.cpu()[kept].view(-1, 1, 1)
        kv = torch.arange(2).view(2, 1, 1, 1)
        heads, dims = torch.arange(self.sizes.heads).view(-1, 1), torch.arange(self.sizes.dim)
        wanted = slots // self.sizes.block_size, kv, slots % self.sizes.block_size, heads, dims
        return tuple(torch.broadcast_tensors(*wanted))


def paged(form_name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Paged:
    """Caches full of random bits."""
    form = FORMS[form_name](sizes)
    memory = [_random_memory(form, dtype, seed).to(device) for seed in range(sizes.layers)]
    caches = [_cache_in(each, form, dtype) for each in memory]
    return Paged(form, memory, caches, form.layout(sizes.block_size, device), sizes)


def _random_memory(form: Form, dtype: torch.dtype, seed: int) -> torch.Tensor:
    elements = torch.Size(form.base).numel() + 2 * _GUARD
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (elements * dtype.itemsize,), dtype=torch.uint8, generator=generator)


def _cache_in(memory: torch.Tensor, form: Form, dtype: torch.dtype) -> torch.Tensor:
    return form.view(memory.view(dtype)[_GUARD:-_GUARD].view(form.base))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: comparisons see every bit."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int = 99) -> torch.Tensor:
    """Every bit pattern that a type has, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).view(*shape)


def random_values(shape: Sequence[int], dtype: torch.dtype, seed: int = 98) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_slots(sizes: Sizes, num_skipped: int = 2) -> torch.Tensor:
    """A slot for each token, no two the same, in no order, and -1 for some."""
    chance = random.Random(5)
    slots = chance.sample(range(sizes.num_blocks * sizes.block_size), sizes.tokens)
    for token in chance.sample(range(sizes.tokens), min(num_skipped, sizes.tokens)):
        slots[token] = -1
    return torch.tensor(slots, dtype=torch.int64)


def slots_in_runs(sizes: Sizes, seed: int = 6) -> torch.Tensor:
    """A slot for each token: blocks in no order, in each a run of neighbours from some offset on; some tokens left out.
    The pages must have room for all tokens twice.
    """
    chance = random.Random(seed)
    blocks = chance.sample(range(sizes.num_blocks), sizes.num_blocks)
    slots: list[int] = []
    while len(slots) < sizes.tokens:
        start = chance.choice([0, chance.randrange(sizes.block_size // 2 + 1)])
        block = blocks.pop() * sizes.block_size
        slots += range(block + start, block + sizes.block_size)
        if chance.random() < 0.5:
            slots[-chance.randrange(1, sizes.block_size - start + 1)] = -1
    return torch.tensor(slots[: sizes.tokens], dtype=torch.int64)


def kept_tokens(slots: torch.Tensor) -> torch.Tensor:
    return (slots.cpu() >= 0).nonzero().flatten()
