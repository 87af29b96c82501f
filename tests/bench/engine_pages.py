"""Pages as vLLM's CPU backend lays them out on this machine, for benchmarks without an engine."""

from __future__ import annotations

from collections.abc import Callable

import torch

CacheUpdate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def isa_of(dtype: torch.dtype, block_size: int, dim: int) -> str:
    """The name of the attention kernel that vLLM's CPU backend chooses. Raises `ImportError` where there is none."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    current_platform.import_kernels()
    isa: str = _get_attn_isa(dtype, block_size, dim, "auto")
    return isa


def cache_update(isa: str) -> CacheUpdate:
    """A function that writes rows [n, heads, dim] into pages as the backend does."""
    from vllm import _custom_ops

    def update(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        _custom_ops.cpu_attn_reshape_and_cache(keys, values, *halves(cache), slots, isa)

    return update


def halves(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of pages [blocks, heads, tokens, 2 * dim], as the backend's kernels want them."""
    blocks, heads, tokens, _ = cache.shape
    keys, values = cache.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)
    return keys, values
