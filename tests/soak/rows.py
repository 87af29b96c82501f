"""Rows in the engine's pages, read without the connector's own operations, and what reuse should have put there."""

from collections.abc import Sequence

import torch

from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.rope import Rope
from vlcache_connector.types import Run


def read_rows(pages: Pages, block_ids: Sequence[int], run: Run) -> torch.Tensor:
    """Keys and values [layers, 2, tokens, heads, dim] of tokens `run`."""
    blocks, elements = _places(pages, block_ids, run)
    return torch.stack([memory[blocks, elements] for memory in _memory(pages)])


def write_rows(pages: Pages, block_ids: Sequence[int], run: Run, rows: torch.Tensor) -> None:
    blocks, elements = _places(pages, block_ids, run)
    for memory, layer in zip(_memory(pages), rows, strict=True):
        memory[blocks, elements] = layer


def reused_row_problem(found: torch.Tensor, stored: torch.Tensor, delta: int, rope: Rope) -> str | None:
    """Why rows in the pages are not the stored rows moved by `delta`; both are float32 [layers, 2, tokens, ...].

    Values must be equal bit for bit, keys too where nothing turns. Else a key's element is a cos - b sin with cosine
    and sine rounded to float32, products and their difference rounded: three roundings of half a spacing each, bounded
    by four of |a| + |b|.
    """
    if not torch.equal(found[:, 1], stored[:, 1]):
        return "values differ from the stored ones"
    if delta == 0:
        return None if torch.equal(found[:, 0], stored[:, 0]) else "keys differ from the stored ones"
    expected, size = turned(stored[:, 0], delta, rope)
    excess = ((found[:, 0].double() - expected).abs() - 4 * 2.0**-24 * size).max().item()
    return None if excess <= 0 else f"keys are off the stored ones turned by {delta}; {excess:.2e} over the bound"


def turned(keys: torch.Tensor, delta: int, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [..., dim] turned in float64 by `delta` positions, and |a| + |b| of the pair of each element."""
    wide = keys.double()
    half = rope.rotary_dim // 2
    left = torch.arange(half) if rope.is_neox else torch.arange(half) * 2
    right = left + half if rope.is_neox else left + 1
    angle = rope.inv_freq.double().cpu() * delta
    a, b = wide[..., left], wide[..., right]
    expected, size = wide.clone(), torch.zeros_like(wide)
    expected[..., left] = a * angle.cos() - b * angle.sin()
    expected[..., right] = b * angle.cos() + a * angle.sin()
    size[..., left] = size[..., right] = a.abs() + b.abs()
    return expected, size


def _memory(pages: Pages) -> list[torch.Tensor]:
    """Each layer's pages as [blocks, elements]."""
    count = int(_elements(pages).max()) + 1
    return [torch.as_strided(c, (c.shape[0], count), (c.stride(0), 1)) for c in pages.caches]


def _elements(pages: Pages) -> torch.Tensor:
    """Where element (K or V, token, head, dim) of a block lies in the block's memory."""
    layout, shape = pages.layout, (2, pages.block_size, *pages.row_shape)
    if layout.order is not None:
        return layout.order.view(shape).long().cpu()
    assert layout.keys and layout.values
    token, head, dim = torch.meshgrid(*(torch.arange(size) for size in shape[1:]), indexing="ij")
    halves = (layout.keys, layout.values)
    return torch.stack([half.origin + token * half.token + head * half.head + dim * half.dim for half in halves])


def _places(pages: Pages, block_ids: Sequence[int], run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and element of each number of the rows [2, tokens, heads, dim]."""
    positions = torch.arange(run.start, run.end)
    blocks = torch.tensor(block_ids)[positions // pages.block_size]
    return blocks.view(1, -1, 1, 1), _elements(pages)[:, positions % pages.block_size]
