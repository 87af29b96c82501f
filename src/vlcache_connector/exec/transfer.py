"""Moves the tokens of entries between the host slab and the engine's pages."""

from collections.abc import Sequence

import torch

from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.rope import Rope
from vlcache_connector.types import Run


def load_runs(
    pages: Pages,
    rope: Rope,
    entry: torch.Tensor,
    offset: int,
    delta: int,
    runs: Sequence[Run],
    block_ids: Sequence[int],
) -> int:
    """Copy tokens of an entry into a request's pages, keys turned by `delta` positions.

    Args:
        entry: keys and values [layers, 2, tokens, heads, dim] of the whole span.
        offset: position of the span's first token in the request.
        runs: absolute positions to load.
        block_ids: the request's blocks.

    Returns:
        Bytes moved.
    """
    nbytes = 0
    for run in runs:
        slots = pages.slots(block_ids, torch.arange(run.start, run.end))
        rows = entry[:, :, run.start - offset : run.end - offset]
        for layer in range(len(entry)):
            keys, values = rows[layer].to(pages.device)
            pages.write(layer, rope.rotate(keys, delta), values, slots)
        nbytes += rows.numel() * rows.element_size()
    return nbytes


def save_run(pages: Pages, entry: torch.Tensor, run: Run, block_ids: Sequence[int]) -> int:
    """Copy tokens `run` of a request from its pages into `entry` [layers, 2, tokens, heads, dim]; returns bytes
    moved.
    """
    for layer in range(len(entry)):
        entry[layer].copy_(pages.read(layer, block_ids, run.start, run.end))
    return entry.numel() * entry.element_size()
