"""Moves the tokens of entries between the host slab and the engine's pages."""

from collections.abc import Iterator, Sequence

import torch

from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.rope import Rope
from vlcache_connector.kernels.ops import load_rows, save_rows
from vlcache_connector.types import Run

_STAGED_NBYTES = 64 << 20
"""Device memory for staging, where pages are not in host memory; large enough that a copy runs at full speed."""


def load_runs(
    pages: Pages,
    rope: Rope,
    entry: torch.Tensor,
    offset: int,
    delta: int,
    runs: Sequence[Run],
    block_ids: Sequence[int],
) -> int:
    """Copy tokens of an entry into a request's pages, keys turned by `delta` positions. A device reads the entry when
    the stream has come that far.

    Args:
        entry: keys and values [layers, 2, tokens, heads, dim] of the whole span.
        offset: position of the span's first token in the request.
        runs: absolute positions to load.
        block_ids: the request's blocks.

    Returns:
        Bytes moved.
    """
    slots = pages.slots(block_ids, runs, offset, entry.shape[2])
    turns = rope.turns(delta, pages.device) if delta else None
    for layers in _staged(entry, pages.device):
        staged = entry[layers].to(pages.device, non_blocking=True)
        load_rows(staged, pages.caches[layers], slots, pages.layout, turns=turns, is_neox=rope.is_neox)
    return entry[:, :, 0].numel() * entry.element_size() * sum(len(run) for run in runs)


def save_run(pages: Pages, entry: torch.Tensor, run: Run, block_ids: Sequence[int]) -> int:
    """Copy tokens `run` of a request from its pages into `entry` [layers, 2, tokens, heads, dim]. From a device that is
    done when the stream has come that far. Returns bytes moved.
    """
    slots = pages.slots(block_ids, [run], run.start, len(run))
    for layers in _staged(entry, pages.device):
        if entry.device == pages.device:
            save_rows(entry[layers], pages.caches[layers], slots, pages.layout)
        else:
            staged = torch.empty(entry[layers].shape, dtype=entry.dtype, device=pages.device)
            save_rows(staged, pages.caches[layers], slots, pages.layout)
            entry[layers].copy_(staged, non_blocking=True)
    return entry.numel() * entry.element_size()


def _staged(entry: torch.Tensor, device: torch.device) -> Iterator[slice]:
    """Layers to move at a time: all where the entry is used in place."""
    layer_nbytes = max(1, entry[0].numel() * entry.element_size())
    step = len(entry) if entry.device == device else max(1, _STAGED_NBYTES // layer_nbytes)
    for first in range(0, len(entry), step):
        yield slice(first, first + step)
