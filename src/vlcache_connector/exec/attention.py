"""Attention of a recompute pass without the engine's own: for sets of scattered tokens, and as a second opinion.

The engine's attention sees each run of tokens as a sequence that reads all its keys again. The operations here see the
tokens of a request together. All of them run after the KV update of the layer, as the engine's attention does.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from vlcache_connector.errors import OptionError
from vlcache_connector.exec.batch import VirtualBatch
from vlcache_connector.exec.pages import Pages
from vlcache_connector.kernels.library import load_libraries
from vlcache_connector.kernels.ops import save_rows, sparse_query_attention


class PassAttention(Protocol):
    """Attention of all tokens of a virtual batch over the pages of one layer."""

    def __call__(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        batch: VirtualBatch,
        softmax_scale: float,
        soft_cap: float,
        out: torch.Tensor,
    ) -> None:
        """Write attention of `query` [tokens, query_heads, dim] into `out`, a tensor of the same shape.

        Args:
            cache: pages of the layer; its rows of the batch are already written.
            soft_cap: 0 for none.
        """
        ...


class SparseQueryAttention:
    """Our own operation: a tile of queries at any positions reads the keys once."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._places: tuple[VirtualBatch, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def is_faster(pages: Pages) -> bool:
        """Whether it beats the engine's attention where tokens are scattered, as far as that was measured: everywhere,
        except where pages are packed for an engine on a CPU that has matrix instructions.
        """
        return pages.layout.order is None and pages.device.type.upper() in load_libraries()

    def __call__(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        batch: VirtualBatch,
        softmax_scale: float,
        soft_cap: float,
        out: torch.Tensor,
    ) -> None:
        if self._places is None or self._places[0] is not batch:  # the layers of a pass share them
            self._places = (batch, *_places(batch, self._pages.device))
        _, table, request, position = self._places
        sparse_query_attention(
            query,
            cache,
            table,
            request,
            position,
            self._pages.layout,
            softmax_scale=softmax_scale,
            soft_cap=soft_cap,
            out=out,
        )


class XformersAttention:
    """xformers' memory-efficient attention over gathered keys. Raises `OptionError` where it cannot run."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        try:
            self._fmha: Any = _import_xformers()
            probe = torch.zeros(1, 8, 1, pages.row_shape[1], dtype=pages.dtype, device=pages.device)
            self._fmha.memory_efficient_attention_forward(probe, probe, probe)
        except (ImportError, NotImplementedError) as error:
            first_line = str(error).splitlines()[0]
            raise OptionError(
                f"option 'attention' is 'xformers', which cannot run here: {first_line} "
                "Install an xformers that was built for this torch and device, or choose 'vlcache' or 'engine'."
            ) from error

    def __call__(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        batch: VirtualBatch,
        softmax_scale: float,
        soft_cap: float,
        out: torch.Tensor,
    ) -> None:
        if soft_cap:
            raise OptionError("option 'attention' is 'xformers', which has no soft cap; choose 'vlcache' or 'engine'")
        heads, dim = self._pages.row_shape
        keys_values = torch.cat([self._gather(cache, batch, row) for row in range(len(batch.rows))], dim=1)
        # [1, tokens, KV heads, query heads of each, dim]: grouped queries share a key without copies
        grouped = query.view(1, len(query), heads, -1, dim)
        keys, values = (rows[None, :, :, None].expand(-1, -1, -1, grouped.shape[3], -1) for rows in keys_values)
        bias = self._fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            [len(row.run) for row in batch.rows], [row.run.end for row in batch.rows]
        )
        attend = self._fmha.memory_efficient_attention_forward
        out.copy_(attend(grouped, keys, values, attn_bias=bias, scale=softmax_scale).view(out.shape))

    def _gather(self, cache: torch.Tensor, batch: VirtualBatch, row: int) -> torch.Tensor:
        """Keys and values [2, tokens, heads, dim] that a row of the batch sees."""
        block_size = self._pages.block_size
        position = torch.arange(batch.rows[row].run.end, device=self._pages.device)
        slots = batch.block_table[row].long()[position // block_size] * block_size + position % block_size
        rows = torch.empty(1, 2, len(position), *self._pages.row_shape, dtype=cache.dtype, device=cache.device)
        save_rows(rows, [cache], slots, self._pages.layout)
        return rows[0]


PASS_ATTENTION: dict[str, Callable[[Pages], PassAttention]] = {
    "vlcache": SparseQueryAttention,
    "xformers": XformersAttention,
}
"""Values of the option `attention` beside "engine"."""


def _import_xformers() -> Any:
    from xformers.ops import fmha

    return fmha


def _places(batch: VirtualBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block table [groups, blocks] of a batch; row in it [tokens] and position [tokens], int32.

    A group is what stays together of a request: how its tokens are summed up depends on the group alone, and so not on
    what else is in the pass.
    """
    groups: dict[tuple[int, int | None], int] = {}
    group_of_row = [groups.setdefault((row.request, row.whole), len(groups)) for row in batch.rows]
    first_rows = [group_of_row.index(group) for group in range(len(groups))]
    numbers = torch.tensor(group_of_row, dtype=torch.int32).repeat_interleave(batch.query_start_loc.diff())
    return batch.block_table[first_rows], numbers.to(device), batch.positions.int().to(device)
