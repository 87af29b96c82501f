"""Conversions between storage types, bit for bit against PyTorch's own, for every value that a type has.

PyTorch lets values past the largest 8-bit float become NaN or infinity; ours saturate, so it gets them clamped.
"""

import pytest
import torch

from kernels.conftest import Implementation
from kernels.paged import DTYPES, FLOAT8, as_bits
from vlcache_connector.kernels.ops import PageLayout, Strides

WIDE = [dtype for dtype in DTYPES if dtype not in FLOAT8]

# Rows of whole vectors, and rows too short for one: kernels convert these one by one.
every_dim = pytest.mark.parametrize("dim", [128, 2])

# Factors that move values between the numbers of a type: to halves of its unit, next to them, past its ends.
FACTORS = [1.0, 1.5, 1.00390625, 1.001953125, 0.9990234375, 1.0000001, 0.0078125, 3.1e-5, 1e-38, 300.0, 1e38]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All bit patterns of an 8- or 16-bit type; of fp32 those that end like a tie of a shorter type, or next to one."""
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    upper = torch.arange(2**16).to(torch.int16)
    if dtype.itemsize == 2:
        return upper.view(dtype)
    lower = torch.tensor([0, 1, -1]).to(torch.int16)
    grid = torch.stack((lower.repeat(2**16), upper.repeat_interleave(len(lower))), dim=-1)
    return grid.view(torch.float32).flatten()


def as_entry(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The values as keys and as values of one head: [1, 2, tokens, 1, dim], filled up with zeros."""
    rows = as_bits(torch.zeros(-(-len(values) // dim), dim, dtype=values.dtype))
    rows.flatten()[: len(values)] = as_bits(values)
    return rows.view(values.dtype).view(1, 1, -1, 1, dim).expand(1, 2, -1, 1, dim).contiguous()


def pages_for(entry: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, PageLayout]:
    """One block that holds all tokens, slots in order."""
    tokens, dim = entry.shape[2], entry.shape[4]
    cache = torch.zeros(1, 2, tokens, dim, dtype=dtype, device=entry.device)
    return (
        cache,
        torch.arange(tokens, device=entry.device),
        PageLayout.alike(tokens, Strides(0, dim, dim, 1), tokens * dim),
    )


def clamped(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values as PyTorch rounds them, without leaving the range of an 8-bit type."""
    limit = torch.finfo(dtype).max
    return (values.clamp(-limit, limit) if dtype in FLOAT8 else values).to(dtype)


def assert_same(found: torch.Tensor, wanted: torch.Tensor, values: torch.Tensor) -> None:
    """Bit for bit; of NaN only that it is one."""
    found, wanted = found.cpu().flatten()[: len(values)], wanted.cpu().flatten()[: len(values)]
    is_nan = wanted.float().isnan()
    wrong = (as_bits(found) != as_bits(wanted)) & ~(is_nan & found.float().isnan())
    first = wrong.nonzero().flatten()[:5]
    assert not wrong.any(), f"{values[first].tolist()}: found {found[first].tolist()}, not {wanted[first].tolist()}"


@every_dim
@pytest.mark.parametrize("scale", [None, 1.0, 0.25, 3.0, 0.0371, 3e-39, 7.5e4], ids=str)
@pytest.mark.parametrize("page", FLOAT8, ids=str)
@pytest.mark.parametrize("staged", WIDE, ids=str)
def test_eight_bit_pages_hold_the_nearest_value_and_saturate(
    implementation: Implementation, staged: torch.dtype, page: torch.dtype, scale: float | None, dim: int
) -> None:
    values = every_value(staged)
    entry = as_entry(values, dim).to(implementation.device)
    cache, slots, layout = pages_for(entry, page)
    # With 3.0 quotients are ties that a product with the reciprocal would miss.
    scales = None if scale is None else torch.tensor([[scale, 2 * scale]], device=implementation.device)
    implementation.load_rows(entry, [cache], slots, layout, scales=scales)
    for kv in range(2):
        divisor = torch.tensor(1.0 if scale is None else scale) * (1 if kv == 0 or scale is None else 2)
        assert_same(cache[0, kv], clamped(values.float() / divisor, page), values)


@every_dim
@pytest.mark.parametrize("scale", [None, 0.25, 0.0371, 7.5e4], ids=str)
@pytest.mark.parametrize("staged", WIDE, ids=str)
@pytest.mark.parametrize("page", FLOAT8, ids=str)
def test_eight_bit_pages_are_read_as_value_times_scale(
    implementation: Implementation, page: torch.dtype, staged: torch.dtype, scale: float | None, dim: int
) -> None:
    values = every_value(page)
    entry = as_entry(values, dim).to(implementation.device)
    cache, slots, layout = pages_for(entry, page)
    implementation.load_rows(entry, [cache], slots, layout)
    found = torch.zeros(entry.shape, dtype=staged, device=implementation.device)
    scales = None if scale is None else torch.tensor([[scale, 2 * scale]], device=implementation.device)
    implementation.save_rows(found, [cache], slots, layout, scales=scales)
    for kv in range(2):
        factor = torch.tensor(1.0 if scale is None else scale) * (1 if kv == 0 or scale is None else 2)
        assert_same(found[0, kv], (values.float() * factor).to(staged), values)


@every_dim
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turned_keys_are_rounded_to_the_nearest_value(
    implementation: Implementation, dtype: torch.dtype, factor: float, dim: int
) -> None:
    """A "turn" with cosine `factor` and sine 0 of pairs (value, 0) multiplies: one fp32 product, rounded once."""
    values = every_value(dtype)
    keys = as_entry(torch.zeros(2 * len(values)).to(dtype), dim)
    half = dim // 2
    padded = as_bits(torch.zeros(keys.shape[2] * half).to(dtype))
    padded[: len(values)] = as_bits(values)
    as_bits(keys)[0, 0, :, 0, :half] = padded.view(-1, half)
    entry = keys.to(implementation.device)
    cache, slots, layout = pages_for(entry, dtype)
    turns = torch.tensor([[factor] * half, [0.0] * half], device=implementation.device)
    implementation.load_rows(entry, [cache], slots, layout, turns=turns)
    wanted = clamped(values.float() * torch.tensor(factor), dtype)
    assert_same(cache[0, 0, :, :half], wanted, values)
