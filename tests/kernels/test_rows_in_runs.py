"""Runs of tokens in neighbouring slots, which pages that hold keys or values dimension by dimension get in squares:
blocks and heads larger and smaller than a square, runs that begin and end anywhere.
"""

import pytest
import torch

from kernels.conftest import Implementation
from kernels.paged import DTYPES, Sizes, as_bits, kept_tokens, paged, random_values, slots_in_runs
from kernels.test_rows import check_copies
from kernels.test_rows_turned import SLACK, U32, exactly_turned, rounding, size_of_pairs, some_angles, turns_of

every_form = pytest.mark.parametrize("form", ["engine", "dim_strided", "keys_transposed", "values_transposed"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_size = pytest.mark.parametrize(
    "sizes",
    [
        Sizes(tokens=70, dim=64, block_size=16, num_blocks=12),
        Sizes(tokens=75, dim=80, block_size=32, num_blocks=8, heads=1),
        Sizes(tokens=301, dim=128, block_size=128, num_blocks=8, layers=1),
        Sizes(tokens=90, dim=33, block_size=48, num_blocks=6),
        Sizes(tokens=60, dim=20, block_size=17, num_blocks=12),
        Sizes(tokens=400, dim=40, block_size=300, num_blocks=4, heads=2),
    ],
    ids=lambda sizes: f"blocks of {sizes.block_size}, {sizes.heads} heads of {sizes.dim}",
)


@every_size
@every_form
@every_dtype
def test_runs_are_copied_bit_for_bit_and_nothing_else_changes(
    implementation: Implementation, form: str, sizes: Sizes, dtype: torch.dtype
) -> None:
    check_copies(implementation, form, sizes, dtype, slots_in_runs(sizes))


@pytest.mark.usefixtures("two_threads")
@every_form
def test_threads_share_runs(implementation: Implementation, form: str) -> None:
    sizes = Sizes(layers=3, tokens=333, heads=4, dim=64, block_size=128, num_blocks=9)
    check_copies(implementation, form, sizes, torch.bfloat16, slots_in_runs(sizes))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("form", ["engine", "keys_transposed", "values_transposed", "kv_outside"])
@pytest.mark.parametrize("dim", [64, 80])
def test_what_is_too_large_for_caches_is_copied_as_well(implementation: Implementation, form: str, dim: int) -> None:
    """Whole cache lines of it are written past them. Rows of 64 dimensions are such lines, parts of those of 80."""
    sizes = Sizes(layers=2, tokens=3000, heads=4, dim=dim, block_size=128, num_blocks=40)
    check_copies(implementation, form, sizes, torch.bfloat16, slots_in_runs(sizes))


@pytest.mark.parametrize("length", [*range(1, 36), 63, 64, 65, 127, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_runs_of_every_length_and_offset_are_copied(
    implementation: Implementation, dtype: torch.dtype, length: int
) -> None:
    sizes = Sizes(layers=1, tokens=length, heads=2, dim=40, block_size=128, num_blocks=2)
    for offset in {0, 1, 128 - length, (128 - length) // 2} & set(range(129 - length)):
        slots = torch.arange(128 + offset, 128 + offset + length)
        check_copies(implementation, "keys_transposed", sizes, dtype, slots)


@every_size
@every_form
@every_dtype
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
def test_keys_of_runs_turn_within_the_rounding_of_their_type(
    implementation: Implementation, form: str, sizes: Sizes, dtype: torch.dtype, is_neox: bool
) -> None:
    """The dimensions behind the rotary ones, and all values, are copied."""
    device, rotary_dim = implementation.device, sizes.dim // 8 * 6
    entry, slots = random_values(sizes.entry_shape, dtype), slots_in_runs(sizes)
    turns = turns_of(some_angles(rotary_dim), device)
    pages = paged(form, sizes, dtype, device)
    implementation.load_rows(
        entry.to(device), pages.caches, slots.to(device), pages.layout, turns=turns, is_neox=is_neox
    )
    kept, before = kept_tokens(slots), paged(form, sizes, dtype, device)
    for layer in range(sizes.layers):
        found = torch.zeros(entry.shape[1:], dtype=dtype)
        as_bits(found)[:, kept] = as_bits(pages.rows(layer, kept, slots))
        assert torch.equal(before.with_rows(layer, kept, slots, as_bits(found)), pages.memory[layer].cpu())
        assert torch.equal(as_bits(found)[1, kept], as_bits(entry)[layer, 1, kept])
        keys, turned = entry[layer, 0, kept], as_bits(found)[0, kept].view(dtype)
        assert torch.equal(as_bits(turned)[..., rotary_dim:], as_bits(keys)[..., rotary_dim:])
        exact = exactly_turned(keys, turns, is_neox)
        bound = 2 * U32 * size_of_pairs(keys, rotary_dim, is_neox)
        bound += rounding(exact.abs() + bound, dtype)
        assert ((turned.double() - exact).abs() <= SLACK * bound).all()
