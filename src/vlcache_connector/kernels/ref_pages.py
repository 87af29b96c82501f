"""Paged memory for the plain-PyTorch twins: where rows lie, and the same refusals as in `csrc/check.h`.

Runs on any device, wherever the operations run as PyTorch. Nothing here is fast.
"""

from collections.abc import Sequence

import torch

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, *FLOAT8)


def require(condition: bool, message: str) -> None:
    """Raises `RuntimeError`, as native code does. `message` starts with the name of the argument."""
    if not condition:
        raise RuntimeError(message)


def require_vector(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], near: torch.Tensor
) -> None:
    """A small contiguous tensor on the device of `near`; -1 in `shape` accepts any size."""
    require(tensor.dtype == dtype, f"{name}: expected {type_name(dtype)}, found {type_name(tensor.dtype)}")
    require_shape(name, tensor, shape)
    require(tensor.is_contiguous(), f"{name}: expected a contiguous tensor, found strides {list(tensor.stride())}")
    require_device(name, tensor, near)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_float(name: str, tensor: torch.Tensor) -> None:
    """A type that entries, queries and pages may have."""
    *names, last = map(type_name, FLOATS)
    fits = tensor.dtype in FLOATS
    require(fits, f"{name}: expected {', '.join(names)} or {last}, found {type_name(tensor.dtype)}")


def require_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    fits = tensor.dim() == len(shape) and all(b in (-1, a) for a, b in zip(tensor.shape, shape, strict=True))
    wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
    require(fits, f"{name}: expected shape [{wanted}], found {list(tensor.shape)}")


def require_dense_rows(name: str, tensor: torch.Tensor) -> None:
    dense = tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    require(dense, f"{name}: expected a last dimension of stride 1, found stride {tensor.stride(-1)}")


def require_device(name: str, tensor: torch.Tensor, near: torch.Tensor) -> None:
    require(tensor.device == near.device, f"{name}: expected on {near.device}, found on {tensor.device}")


def last_element_of_block(cache: torch.Tensor) -> int:
    """Elements from the first of a block to its last; -1 when a block is empty."""
    if 0 in cache.shape[1:]:
        return -1
    return sum((size - 1) * stride for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True))


def require_layout(
    name: str,
    cache: torch.Tensor,
    heads: int,
    dim: int,
    block_size: int,
    layout: Sequence[int],
    order: torch.Tensor | None,
) -> None:
    """Refuses layouts that reach outside a block of `cache`, the argument called `name`."""
    require(cache.dim() >= 1, f"{name}: expected at least one dimension (blocks), found none")
    require(0 < block_size < 2**31, f"block_size: expected 1 to 2147483647, found {block_size}")
    end = last_element_of_block(cache)
    if order is not None:
        require(not layout, f"layout: expected no strides beside an order table, found {list(layout)}")
        require_vector("order", order, torch.int32, [2 * block_size * heads * dim], cache)
        inside = order.is_cuda or order.numel() == 0 or bool((order.min() >= 0) & (order.max() <= end))
        require(inside, f"order: expected 0 to {end}, found others")
        return
    wanted = "8 numbers (origin and strides of token, head, dim; of K, then of V)"
    require(len(layout) == 8, f"layout: expected {wanted}, found {len(layout)}")
    if heads * dim == 0:
        return
    for origin, *strides in (layout[:4], layout[4:]):
        spans = [stride * (size - 1) for stride, size in zip(strides, (block_size, heads, dim), strict=True)]
        first, last = (origin + sum(pick(span, 0) for span in spans) for pick in (min, max))
        inside = first >= 0 and last <= end
        require(inside, f"layout: expected elements 0 to {end} of a block of {name}, found {first} to {last}")


def require_slots(slots: torch.Tensor, end: int) -> None:
    """Refuses slots other than -1 to end - 1. On a GPU they are not looked at, as native code could not either."""
    if slots.is_cuda or slots.numel() == 0:
        return
    low, high = int(slots.min()), int(slots.max())
    require(low >= -1 and high < end, f"slots: expected -1 to {end - 1}, found {low if low < -1 else high}")


def block_elements(
    heads: int, dim: int, block_size: int, layout: Sequence[int], order: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Offsets in a block of all its elements: int64 [2, block_size, heads, dim]."""
    if order is not None:
        return order.view(2, block_size, heads, dim).long()
    strides = torch.tensor(layout, device=device).view(2, 4, 1, 1, 1)
    origin, token, head, element = strides.unbind(1)
    tokens, all_heads, dims = (torch.arange(size, device=device) for size in (block_size, heads, dim))
    return origin + token * tokens.view(-1, 1, 1) + head * all_heads.view(-1, 1) + element * dims


def flat_memory(cache: torch.Tensor) -> torch.Tensor:
    """All memory of `cache` from its first element to its last, gaps included: a one-dimensional view."""
    if cache.numel() == 0:
        return cache.reshape(-1)
    end = (cache.shape[0] - 1) * cache.stride(0) + last_element_of_block(cache) + 1
    return cache.as_strided((end,), (1,))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """8-bit floats as integers, which PyTorch can index; others as they are."""
    return tensor.view(torch.uint8) if tensor.dtype in FLOAT8 else tensor


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values in `dtype`, to nearest even; 8-bit floats saturate."""
    if dtype in FLOAT8:
        limit = torch.finfo(dtype).max
        values = values.clamp(-limit, limit)
    return values.to(dtype)
