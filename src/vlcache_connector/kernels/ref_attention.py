"""Plain-PyTorch twin of `sparse_query_attention`: used where nothing was compiled and in tests; any device, slow."""

from collections.abc import Sequence

import torch

from vlcache_connector.kernels import ref_pages as pages

_QUERIES_AT_ONCE = 256  # bounds the memory of the scores


def sparse_query_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request: torch.Tensor,
    position: torch.Tensor,
    scales: torch.Tensor | None,
    block_size: int,
    layout: Sequence[int],
    order: torch.Tensor | None,
    softmax_scale: float,
    window: int,
    soft_cap: float,
) -> None:
    """See `ops.sparse_query_attention`."""
    heads = _kv_heads(query, cache, block_size, order)
    pages.require_layout("cache", cache, heads, query.shape[2], block_size, layout, order)
    _require_arguments(out, query, cache, block_table, request, position, scales)
    _require_numbers(softmax_scale, window, soft_cap)
    _require_places(cache, block_table, request, position, block_size, window)
    elements = pages.block_elements(heads, query.shape[2], block_size, layout, order, cache.device)
    for row in request.unique().tolist():
        asked = (request == row).nonzero().flatten()
        end = int(position[asked].max()) + 1
        first = max(0, int(position[asked].min()) - window + 1) // block_size * block_size if window else 0
        blocks = block_table[row, first // block_size : (end - 1) // block_size + 1].long()
        where = elements[:, None] + (blocks * cache.stride(0)).view(1, -1, 1, 1, 1)
        stored = pages.as_bits(pages.flat_memory(cache))[where.flatten(1, 2)[:, : end - first]].view(cache.dtype)
        keys, values = stored.float() if scales is None else stored.float() * scales.view(2, 1, 1, 1)
        key_position = torch.arange(first, end, device=cache.device)
        for part in asked.split(_QUERIES_AT_ONCE):
            age = position[part].view(-1, 1) - key_position
            seen = (age >= 0) & (age < window) if window else age >= 0
            rows = query[part].float().unflatten(1, (heads, -1))
            scores = torch.einsum("qhgd,khd->hgqk", rows, keys) * softmax_scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            weights = torch.where(seen, scores, -torch.inf).softmax(dim=-1)
            out[part] = _weighted(weights, values, seen).flatten(1, 2).to(out.dtype)


def _weighted(weights: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Sums [queries, heads, group, dim] of `values` [keys, heads, dim]. A value that a query does not see may be NaN,
    and 0 times NaN is NaN: such keys are added apart, to the queries that see them.
    """
    odd = (~values.isfinite()).any(dim=-1).any(dim=-1)
    sums = torch.einsum("hgqk,khd->qhgd", weights, values.where(~odd.view(-1, 1, 1), 0))
    for key in odd.nonzero().flatten().tolist():
        extra = weights[..., key].permute(2, 0, 1).unsqueeze(-1) * values[key].unsqueeze(1)
        sums += extra.where(seen[:, key].view(-1, 1, 1, 1), 0)
    return sums


def _kv_heads(query: torch.Tensor, cache: torch.Tensor, block_size: int, order: torch.Tensor | None) -> int:
    """How many heads a block of `cache` (or the order table) has room for."""
    pages.require_shape("query", query, [-1, -1, -1])
    pages.require(0 not in query.shape[1:], f"query: expected heads and dimensions, found {list(query.shape)}")
    pages.require(cache.dim() >= 1, "cache: expected at least one dimension (blocks), found none")
    pages.require(0 < block_size < 2**31, f"block_size: expected 1 to 2147483647, found {block_size}")
    name, elements = ("cache", cache.shape[1:].numel()) if order is None else ("order", order.numel())
    heads, left = divmod(elements, 2 * block_size * query.shape[2])
    wanted = f"2 * {block_size} (block_size) * heads * {query.shape[2]} (dimensions of query)"
    pages.require(heads >= 1 and left == 0, f"{name}: expected {wanted} elements of a block, found {elements}")
    fits = query.shape[1] % heads == 0
    pages.require(fits, f"query: expected a multiple of the {heads} KV heads of {name}, found {query.shape[1]} heads")
    return heads


def _require_arguments(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request: torch.Tensor,
    position: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    types = [dtype for dtype in pages.FLOATS if dtype not in pages.FLOAT8]
    pages.require(query.dtype in types, f"query: expected one of {types}, found {query.dtype}")
    dense = query.shape[2] == 1 or query.stride(2) == 1
    pages.require(dense, f"query: expected a last dimension of stride 1, found stride {query.stride(2)}")
    pages.require_vector("out", out, query.dtype, query.shape, query)
    pages.require(cache.dtype in pages.FLOATS, f"cache: expected one of {pages.FLOATS}, found {cache.dtype}")
    pages.require_device("cache", cache, query)
    pages.require_vector("block_table", block_table, torch.int32, [-1, -1], query)
    pages.require_vector("request", request, torch.int32, [len(query)], query)
    pages.require_vector("position", position, torch.int32, [len(query)], query)
    if scales is not None:
        pages.require(cache.dtype in pages.FLOAT8, f"scales: expected none for pages of {cache.dtype}")
        pages.require_vector("scales", scales, torch.float32, [2], query)


def _require_numbers(softmax_scale: float, window: int, soft_cap: float) -> None:
    largest = torch.finfo(torch.float32).max
    fits = abs(softmax_scale) <= largest
    pages.require(fits, f"softmax_scale: expected a finite float32 number, found {softmax_scale}")
    pages.require(window >= 0, f"window: expected 0 (all keys) or more, found {window}")
    pages.require(0 <= soft_cap <= largest, f"soft_cap: expected 0 (none) or more, found {soft_cap}")


def _require_places(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request: torch.Tensor,
    position: torch.Tensor,
    block_size: int,
    window: int,
) -> None:
    """Refuses queries and blocks that do not exist; of the block table, only what a request's queries see and what lies
    between. Native code on a GPU does not look; here a wrong index would leave the device unusable.
    """
    for name, numbers, end in (
        ("request", request, len(block_table)),
        ("position", position, block_table.shape[1] * block_size),
    ):
        wrong = numbers[(numbers < 0) | (numbers >= end)]
        pages.require(len(wrong) == 0, f"{name}: expected 0 to {end - 1}, found {wrong[:1].tolist()}")
    for row in request.unique().tolist():
        seen = position[request == row]
        first = max(0, int(seen.min()) - window + 1) if window else 0
        used = block_table[row, first // block_size : int(seen.max()) // block_size + 1]
        wrong = used[(used < 0) | (used >= len(cache))]
        found = f"found {wrong[:1].tolist()} in row {row}"
        pages.require(len(wrong) == 0, f"block_table: expected 0 to {len(cache) - 1}, {found}")
