"""Plain-PyTorch twins of the native operations, with their schemas' arguments: used where nothing was compiled, and in
tests. They work on any device; nothing here is fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlcache_connector.kernels import ref_pages as pages
from vlcache_connector.kernels.ref_attention import sparse_query_attention
from vlcache_connector.kernels.ref_shift import shift_rows

__all__ = ["load_rows", "save_rows", "shift_rows", "sparse_query_attention"]

_MAX_LAYERS = 256  # kMaxLayers in csrc/params.h


def load_rows(
    entry: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    turns: torch.Tensor | None,
    is_neox: bool,
    scales: torch.Tensor | None,
    block_size: int,
    layout: Sequence[int],
    order: torch.Tensor | None,
) -> None:
    """See `ops.load_rows`."""
    rows = _rows(entry, caches, slots, turns, scales, block_size, layout, order)
    for layer, cache in enumerate(caches):
        keys, values = pages.as_bits(entry[layer])[:, rows.tokens].view(entry.dtype)
        key_scale, value_scale = (None, None) if scales is None else scales[layer]
        stored = _stored(keys, cache.dtype, key_scale), _stored(values, cache.dtype, value_scale)
        if turns is not None:
            rotary = _turned(keys, turns, is_neox)
            stored[0][..., : rotary.shape[-1]] = _stored(rotary, cache.dtype, key_scale)
        pages.as_bits(pages.flat_memory(cache))[rows.elements] = pages.as_bits(torch.stack(stored))


def save_rows(
    entry: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    scales: torch.Tensor | None,
    block_size: int,
    layout: Sequence[int],
    order: torch.Tensor | None,
) -> None:
    """See `ops.save_rows`."""
    rows = _rows(entry, caches, slots, None, scales, block_size, layout, order)
    for layer, cache in enumerate(caches):
        stored = pages.as_bits(pages.flat_memory(cache))[rows.elements].view(cache.dtype)
        if stored.dtype != entry.dtype:
            wide = stored.float() if scales is None else stored.float() * scales[layer].view(2, 1, 1, 1)
            stored = wide.to(entry.dtype)
        pages.as_bits(entry[layer])[:, rows.tokens] = pages.as_bits(stored)


@dataclass(frozen=True, slots=True)
class _Rows:
    tokens: torch.Tensor  # [n] those with a slot
    elements: torch.Tensor  # [2, n, heads, dim] where they lie in the memory of a cache


def _rows(
    entry: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    turns: torch.Tensor | None,
    scales: torch.Tensor | None,
    block_size: int,
    layout: Sequence[int],
    order: torch.Tensor | None,
) -> _Rows:
    """Raises `RuntimeError` naming the argument that is wrong."""
    near = caches[0] if caches else entry
    pages.require(len(caches) <= _MAX_LAYERS, f"caches: expected at most {_MAX_LAYERS} layers, found {len(caches)}")
    pages.require_float("entry", entry)
    pages.require_shape("entry", entry, [len(caches), 2, -1, -1, -1])
    pages.require_dense_rows("entry", entry)
    pages.require_device("entry", entry, near)
    _, _, tokens, heads, dim = entry.shape
    pages.require_vector("slots", slots, torch.int64, [tokens], near)
    if not caches:
        return _Rows(slots, slots)
    for layer, cache in enumerate(caches):
        pages.require_layout(f"caches[{layer}]", cache, heads, dim, block_size, layout, order)
        _require_like(f"caches[{layer}]", cache, near)
    _require_types(entry, near, scales)
    if turns is not None:
        pages.require_vector("turns", turns, torch.float32, [2, -1], near)
        pages.require(2 * turns.shape[1] <= dim, f"turns: expected at most {dim // 2} angles, found {turns.shape[1]}")
    end = near.shape[0] * block_size
    pages.require_slots(slots, end)
    kept = ((slots >= 0) & (slots < end)).nonzero().flatten()
    blocks, offsets = slots[kept] // block_size, slots[kept] % block_size
    elements = pages.block_elements(heads, dim, block_size, layout, order, near.device)[:, offsets]
    return _Rows(kept, elements + (blocks * near.stride(0)).view(-1, 1, 1))


def _require_like(name: str, cache: torch.Tensor, first: torch.Tensor) -> None:
    wanted, found = pages.type_name(first.dtype), pages.type_name(cache.dtype)
    pages.require(cache.dtype == first.dtype, f"{name}: expected {wanted}, found {found}")
    pages.require_device(name, cache, first)
    sizes, others = (cache.shape[0], cache.stride(0)), (first.shape[0], first.stride(0))
    pages.require(sizes == others, f"{name}: expected blocks and block stride {others} like caches[0], found {sizes}")


def _require_types(entry: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None) -> None:
    pages.require_float("caches[0]", cache)
    staged, page = pages.type_name(entry.dtype), pages.type_name(cache.dtype)
    converts = cache.dtype in pages.FLOAT8 and entry.dtype not in pages.FLOAT8
    same = entry.dtype == cache.dtype
    wider = " (or float32, bfloat16 or float16 for 8-bit pages)"
    pages.require(same or converts, f"entry: expected {page} like the pages{wider}, found {staged}")
    if scales is not None:
        pages.require(converts, f"scales: expected none, since the pages hold what the entry holds (both {page})")
        pages.require_vector("scales", scales, torch.float32, [len(entry), 2], cache)


def _stored(rows: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """What pages of `dtype` hold for rows: a new tensor, bit for bit the same where nothing is to be converted."""
    if rows.dtype == dtype and scale is None:
        return rows.clone()
    values = rows.float()
    return pages.rounded(values if scale is None else values / scale, dtype)


def _turned(keys: torch.Tensor, turns: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """The rotary dimensions of keys [n, heads, dim], rotated: fp32, not rounded yet."""
    rotary = keys[..., : 2 * turns.shape[1]].float()
    x, y = rotary.chunk(2, dim=-1) if is_neox else (rotary[..., 0::2], rotary[..., 1::2])
    cos, sin = turns
    a, b = x * cos - y * sin, y * cos + x * sin
    return torch.cat((a, b), dim=-1) if is_neox else torch.stack((a, b), dim=-1).flatten(-2)
