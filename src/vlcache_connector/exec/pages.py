"""Reading and writing tokens in the engine's paged KV cache.

Writing goes through the attention layer's own cache update, which is right for every backend. Reading has no such
function, so the order of elements inside a block is learnt once: index-coded keys and values are written into a scratch
block through that same update, and where each code landed is the map from logical to physical elements.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CacheUpdate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(keys [n, heads, dim], values [n, heads, dim], cache, slots [n]) -> None"""


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """One attention layer's pages. `cache` has the block index as its first dimension."""

    name: str
    cache: torch.Tensor
    update: CacheUpdate


class Pages:
    """The pages of all layers of one rank; a slot is `block_id * block_size + offset`."""

    def __init__(self, layers: Sequence[PagedLayer], block_size: int, num_kv_heads: int, head_dim: int) -> None:
        self.layers = tuple(layers)
        self.block_size = block_size
        self._shape = (2, block_size, num_kv_heads, head_dim)
        self.device = self.layers[0].cache.device
        self.dtype = self.layers[0].cache.dtype
        self._order = self._learn_order(self.layers[0])

    def slots(self, block_ids: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
        """Slots [n] of the tokens at `positions` [n] of a request with these blocks; int64, on the pages' device."""
        blocks = torch.tensor(block_ids, dtype=torch.int64)
        slots = blocks[positions // self.block_size] * self.block_size + positions % self.block_size
        return slots.to(self.device)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Write rows [n, heads, dim] of one layer to `slots` [n]."""
        paged = self.layers[layer]
        paged.update(keys.contiguous(), values.contiguous(), paged.cache, slots)

    def read(self, layer: int, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Keys and values of tokens [start, end) of a request: a new tensor [2, end - start, heads, dim]."""
        first, last = start // self.block_size, (end - 1) // self.block_size
        wanted = torch.tensor(block_ids[first : last + 1], dtype=torch.int64, device=self.device)
        blocks = self.layers[layer].cache[wanted].reshape(len(wanted), -1)
        logical = self._order.gather(blocks).view(len(wanted), *self._shape)
        rows = logical.transpose(0, 1).reshape(2, -1, *self._shape[2:])
        skipped = first * self.block_size
        return rows[:, start - skipped : end - skipped]

    def _learn_order(self, paged: PagedLayer) -> "_BlockOrder":
        """Write each element's own index, one base-256 digit at a time (exact in every cache dtype)."""
        count = 2 * self.block_size * self._shape[2] * self._shape[3]
        index = torch.arange(count, device=self.device).view(self._shape)
        slots = torch.arange(self.block_size, device=self.device)
        seen = torch.zeros(count, dtype=torch.int64, device=self.device)
        for shift in (0, 8, 16):
            digit = ((index >> shift) & 255).to(self.dtype)
            scratch = torch.zeros_like(paged.cache[:1])
            paged.update(digit[0].contiguous(), digit[1].contiguous(), scratch, slots)
            seen += scratch.reshape(-1).to(torch.int64) << shift
        if not torch.equal(seen.sort().values, index.flatten()):
            raise RuntimeError(
                f"layer {paged.name}: the pages do not hold every element once; this KV layout is unknown"
            )
        physical = torch.empty_like(seen)
        physical[seen] = index.flatten()
        return _BlockOrder(physical.view(self._shape))


class _BlockOrder:
    """Where the logical element (k or v, token, head, dim) of a block lies in the block's memory."""

    def __init__(self, physical: torch.Tensor) -> None:
        self._flat = physical.flatten()
        # Unpacked layouts are affine: a strided view reads them at memory speed. Packed ones need the index table.
        origin = int(self._flat[0])
        ones = [tuple(int(i == axis) for i in range(4)) for axis in range(4)]
        self._strides = [int(physical[one]) - origin if physical.shape[a] > 1 else 0 for a, one in enumerate(ones)]
        grid = torch.zeros_like(physical) + origin
        for axis, (size, stride) in enumerate(zip(physical.shape, self._strides, strict=True)):
            shape = [1] * 4
            shape[axis] = size
            grid += (torch.arange(size, device=physical.device) * stride).view(shape)
        self._origin = origin
        self._shape = tuple(physical.shape)
        self.is_affine = bool(torch.equal(grid, physical)) and min(self._strides) >= 0

    def gather(self, blocks: torch.Tensor) -> torch.Tensor:
        """Logical elements of `blocks` [n, elements]: shape [n, 2, block_size, heads, dim] (a view where affine)."""
        if self.is_affine:
            return blocks.as_strided((len(blocks), *self._shape), (blocks.stride(0), *self._strides), self._origin)
        return blocks.index_select(1, self._flat).view(len(blocks), *self._shape)
