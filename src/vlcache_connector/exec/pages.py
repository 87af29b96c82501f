"""The engine's paged KV cache as the native operations see it: tensors, and the order of elements inside a block.

No backend tells that order, so it is learnt once: index-coded keys and values are written into a scratch block through
the attention layer's own cache update, and where each code landed is the map from logical to physical elements.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlcache_connector.exec.batch import positions_of
from vlcache_connector.kernels.ops import PageLayout, Strides
from vlcache_connector.types import Run

CacheUpdate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(keys [n, heads, dim], values [n, heads, dim], cache, slots [n]) -> None"""


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """One attention layer's pages. `cache` has the block index as its first dimension."""

    name: str
    cache: torch.Tensor
    update: CacheUpdate


class Pages:
    """The pages of all layers of one rank; a slot is `block_id * block_size + offset`.

    Raises `RuntimeError` when the layers differ in layout, or when their cache update does not store every element.
    """

    def __init__(self, layers: Sequence[PagedLayer], block_size: int, num_kv_heads: int, head_dim: int) -> None:
        first = layers[0].cache
        for layer in layers:
            cache = layer.cache
            if (cache.shape, cache.stride(), cache.dtype) != (first.shape, first.stride(), first.dtype):
                raise RuntimeError(f"layer {layer.name}: its pages differ from those of layer {layers[0].name}")
        self.caches = tuple(layer.cache for layer in layers)
        self.block_size = block_size
        self.row_shape = (num_kv_heads, head_dim)
        self.device = first.device
        self.dtype = first.dtype
        self.layout = _page_layout(block_size, _learn_order(layers[0], (2, block_size, num_kv_heads, head_dim)))

    def slots(self, block_ids: Sequence[int], runs: Sequence[Run], offset: int, count: int) -> torch.Tensor:
        """Slots of `count` tokens of a request from position `offset` on: int64, on the pages' device; -1 outside
        `runs`.
        """
        blocks = torch.tensor(block_ids, dtype=torch.int64)
        positions = positions_of(runs)
        slots = torch.full((count,), -1, dtype=torch.int64)
        slots[positions - offset] = blocks[positions // self.block_size] * self.block_size + positions % self.block_size
        return slots.to(self.device)


def _learn_order(paged: PagedLayer, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Physical offset of each logical element (K or V, token, head, dim) of a block, int64 of that shape.

    Each element's number is written one base-256 digit at a time, which is exact in every unscaled cache dtype.
    """
    block = paged.cache[:1]
    count = 2 * shape[1] * shape[2] * shape[3]
    number = torch.arange(count, device=block.device).view(shape)
    slots = torch.arange(shape[1], device=block.device)
    seen = torch.zeros(block.numel(), dtype=torch.int64, device=block.device)
    for shift in (0, 8, 16):
        digit = ((number >> shift) & 255).to(block.dtype)
        scratch = torch.zeros_like(block)
        paged.update(digit[0].contiguous(), digit[1].contiguous(), scratch, slots)
        seen += scratch.reshape(-1).to(torch.int64) << shift
    if not torch.equal(seen.sort().values, number.flatten()):
        raise RuntimeError(f"layer {paged.name}: the pages do not hold every element once; this KV layout is unknown")
    offset = torch.zeros(block.shape, dtype=torch.int64, device=block.device)
    for axis, (size, stride) in enumerate(zip(block.shape, block.stride(), strict=True)):
        along = [-1 if i == axis else 1 for i in range(block.dim())]
        offset += (torch.arange(size, device=block.device) * stride).view(along)
    physical = torch.empty_like(seen)
    physical[seen] = offset.flatten()
    return physical.view(shape)


def _page_layout(block_size: int, order: torch.Tensor) -> PageLayout:
    """Strides where they say the order of keys and that of values; the index table otherwise."""
    physical = order.cpu()
    keys, values = _strides(physical[0]), _strides(physical[1])
    if keys is None or values is None:
        return PageLayout(block_size, order=physical.flatten().to(order.device, torch.int32))
    return PageLayout(block_size, keys, values)


def _strides(physical: torch.Tensor) -> Strides | None:
    """Of the offsets [token, head, dim] of keys or values; None where no strides give them all."""
    origin = int(physical[0, 0, 0])
    token, head, dim = (
        int(physical.select(axis, 1).flatten()[0]) - origin if size > 1 else 1
        for axis, size in enumerate(physical.shape)
    )
    tokens, heads, dims = (torch.arange(size) for size in physical.shape)
    grid = origin + token * tokens.view(-1, 1, 1) + head * heads.view(-1, 1) + dim * dims
    return Strides(origin, token, head, dim) if torch.equal(grid, physical) else None
