"""Rows in and out of pages the way the connector moves them, one layer at a time."""

from collections.abc import Sequence

import torch

from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.rope import Rope
from vlcache_connector.exec.transfer import load_runs, save_run
from vlcache_connector.types import Run

NO_ROPE = Rope(torch.ones(1), is_neox=True)


def layer_of(pages: Pages, layer: int) -> Pages:
    """The same pages, seen as if the model had this layer only."""
    alone = object.__new__(Pages)
    alone.__dict__.update(pages.__dict__, caches=pages.caches[layer : layer + 1])
    return alone


def write(pages: Pages, block_ids: Sequence[int], rows: torch.Tensor, start: int, layer: int = 0) -> None:
    """Keys and values [2, tokens, heads, dim] into the pages of a request from position `start` on."""
    runs = [Run(start, start + rows.shape[1])] if rows.shape[1] else []
    load_runs(layer_of(pages, layer), NO_ROPE, rows[None], start, 0, runs, block_ids)


def read(pages: Pages, block_ids: Sequence[int], start: int, end: int, layer: int = 0) -> torch.Tensor:
    """Keys and values [2, end - start, heads, dim] of a request."""
    entry = torch.empty(1, 2, end - start, *pages.row_shape, dtype=pages.dtype)
    save_run(layer_of(pages, layer), entry, Run(start, end), block_ids)
    return entry[0]
