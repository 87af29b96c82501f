"""Schemas of the native operations and the functions that call them.

An operation is defined once, here. `library.load_libraries()` attaches the compiled implementations of `csrc/`; for a
device that has none, the plain-PyTorch twin of `ref` is registered instead, so the functions below always work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from vlcache_connector.kernels import library, ref

_SCHEMAS = (
    "load_rows(Tensor entry, Tensor(a!)[] caches, Tensor slots, Tensor? turns, bool is_neox, Tensor? scales,"
    " int block_size, int[] layout, Tensor? order) -> ()",
    "save_rows(Tensor(a!) entry, Tensor[] caches, Tensor slots, Tensor? scales,"
    " int block_size, int[] layout, Tensor? order) -> ()",
    "shift_rows(Tensor(a!) out, Tensor entry, Tensor shift, Tensor places, Tensor? turns, bool is_neox) -> ()",
    "sparse_query_attention(Tensor(a!) out, Tensor query, Tensor cache, Tensor block_table, Tensor request,"
    " Tensor position, Tensor? scales, int block_size, int[] layout, Tensor? order,"
    " float softmax_scale, int window, float soft_cap) -> ()",
)


class Strides(NamedTuple):
    """Where element (token, head, dim) of a block's keys or values lies: at `origin` and so many elements further for
    each token, head and dimension.
    """

    origin: int
    token: int
    head: int
    dim: int


@dataclass(frozen=True, slots=True, eq=False)
class PageLayout:
    """Where element (K or V, token, head, dim) of a block lies in the block's memory, in elements.

    Keys and values have strides of their own: some engines store keys transposed, the tokens of a dimension side by
    side. Packed layouts have an `order` instead: int32 [2 * block_size * heads * dim], logical element -> physical
    offset.
    """

    block_size: int
    keys: Strides | None = None
    values: Strides | None = None
    order: torch.Tensor | None = None

    @classmethod
    def alike(cls, block_size: int, keys: Strides, kv: int) -> Self:
        """Values lie as keys do, `kv` elements further on."""
        return cls(block_size, keys, keys._replace(origin=keys.origin + kv))

    @property
    def numbers(self) -> list[int]:
        """What the schemas call `layout`: the strides of keys, then of values; nothing of a packed layout."""
        return [*(self.keys or ()), *(self.values or ())]


def load_rows(
    entry: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    layout: PageLayout,
    *,
    turns: torch.Tensor | None = None,
    is_neox: bool = True,
    scales: torch.Tensor | None = None,
) -> None:
    """Write staged keys and values into pages, keys rotated on the way.

    Args:
        entry: [layers, 2, tokens, heads, dim], last dimension contiguous, on the device of the pages.
        caches: the pages of each layer, first dimension = block. Same type as `entry`, or an 8-bit float.
        slots: [tokens] int64, `block * block_size + offset`; tokens with -1 are left out.
        turns: [2, rotary_dim / 2] fp32, cosines and sines of the angle by which each pair of a key turns; None copies
            keys bit for bit. Dimensions past `rotary_dim` are copied.
        is_neox: pairs are (i, i + rotary_dim / 2), else (2i, 2i + 1).
        scales: [layers, 2] fp32 for K and V: a page holds value / scale. When `entry` has the type of 8-bit pages,
            it holds scaled values as well and no scale is needed.

    Raises:
        RuntimeError: an argument has a wrong shape, type or device; the message names it. Nothing was written.
    """
    torch.ops.vlcache.load_rows(
        entry, list(caches), slots, turns, is_neox, scales, layout.block_size, layout.numbers, layout.order
    )


def save_rows(
    entry: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    layout: PageLayout,
    *,
    scales: torch.Tensor | None = None,
) -> None:
    """Copy tokens from pages into `entry`, the inverse of `load_rows` without rotation. Tokens with slot -1 keep what
    `entry` has. Arguments and errors as there.
    """
    torch.ops.vlcache.save_rows(entry, list(caches), slots, scales, layout.block_size, layout.numbers, layout.order)


def shift_rows(
    entry: torch.Tensor,
    shift: torch.Tensor,
    places: torch.Tensor,
    *,
    turns: torch.Tensor | None = None,
    is_neox: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Staged keys and values of one layer, turned and with a change added to each.

    A key changes as it was before rotary positions turned it: K' = R(turns) K + R(place) shift. Everything is added in
    fp32 and rounded once.

    Args:
        entry: [2, tokens, heads, dim], last dimension contiguous.
        shift: [2, tokens, heads, dim] in the type of `entry`, last dimension contiguous: of keys before rotation and of
            values. One change for all tokens may be expanded. An entry of 8-bit floats holds scaled values, and its
            shift is scaled likewise.
        places: [tokens, 2, rotary_dim / 2] fp32, contiguous, cosines and sines of the angles of each token's new
            position.
        turns, is_neox: as in `load_rows`.
        out: where to write, last dimension contiguous: may be `entry`, and shares no memory with it otherwise, nor
            with `shift`; a new tensor by default.

    Returns:
        [2, tokens, heads, dim] in the type of `entry`, to be loaded without turning it again.

    Raises:
        RuntimeError: an argument has a wrong shape, type or device; the message names it. Nothing was written.
    """
    result = torch.empty(entry.shape, dtype=entry.dtype, device=entry.device) if out is None else out
    torch.ops.vlcache.shift_rows(result, entry, shift, places, turns, is_neox)
    return result


def sparse_query_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request: torch.Tensor,
    position: torch.Tensor,
    layout: PageLayout,
    *,
    softmax_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of queries at arbitrary positions over paged keys and values, accumulated in fp32.

    Args:
        query: [queries, query_heads, dim]; `query_heads` is a multiple of the pages' heads (GQA, MQA).
        cache: the pages of one layer, first dimension = block.
        block_table: [requests, blocks] int32.
        request: [queries] int32, row of the block table. Fastest when queries of a request are neighbours.
        position: [queries] int32; a query sees keys 0 to its position, both included.
        window: a query sees its last `window` keys only; 0 for all.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; 0 leaves them.
        scales: [2] fp32 for K and V of 8-bit pages.
        out: where to write; a new tensor by default.

    Returns:
        [queries, query_heads, dim] in the type of `query`.

    Raises:
        RuntimeError: an argument has a wrong shape, type or device; the message names it.
    """
    result = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    torch.ops.vlcache.sparse_query_attention(
        result,
        query,
        cache,
        block_table,
        request,
        position,
        scales,
        layout.block_size,
        layout.numbers,
        layout.order,
        softmax_scale,
        window,
        soft_cap,
    )
    return result


_definitions = torch.library.Library("vlcache", "DEF")
for _schema in _SCHEMAS:
    _definitions.define(_schema)
_native = library.load_libraries()
for _device in ("CPU", "CUDA"):
    if _device not in _native:
        for _twin in (ref.load_rows, ref.save_rows, ref.shift_rows, ref.sparse_query_attention):
            _definitions.impl(_twin.__name__, _twin, _device)
