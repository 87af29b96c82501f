"""shift_rows against a loop over tokens with complex multiplication in double precision, and what it has in common with
load_rows.

Bounds are those of test_rows_turned.py: a turned pair is off by 2 u (|x| + |y|), of the key and of its change; their
sum is rounded to fp32, and what is stored once more.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from kernels.conftest import Implementation
from kernels.paged import DTYPES, FLOAT8, Sizes, as_bits, random_bits, random_values
from kernels.test_rows_turned import (
    SLACK,
    U32,
    exactly_turned,
    load_and_look,
    rounding,
    size_of_pairs,
    some_angles,
    turns_of,
)
from vlcache_connector.kernels import ref

every_style = pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
with_and_without_turns = pytest.mark.parametrize("turns_keys", [True, False], ids=["turned", "as_they_are"])

AWKWARD_SIZES = [  # tokens, heads, dim, rotary_dim
    (7, 1, 80, 80),
    (1, 2, 96, 96),
    (5, 3, 128, 32),
    (4, 2, 64, 0),
    (6, 5, 33, 32),
    (3, 2, 20, 12),
    (2, 1, 1, 0),
    (2, 1, 2, 2),
    (9, 2, 86, 82),
    (3, 1, 256, 64),
]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Arguments of a call, on the CPU."""

    entry: torch.Tensor
    shift: torch.Tensor
    places: torch.Tensor
    turns: torch.Tensor | None
    is_neox: bool

    def solve(
        self,
        implementation: Implementation,
        entry: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        device = implementation.device
        turns = None if self.turns is None else self.turns.to(device)
        where = (self.entry if entry is None else entry).to(device), self.shift.to(device), self.places.to(device)
        return implementation.shift_rows(*where, turns=turns, is_neox=self.is_neox, out=out).cpu()


def problem(sizes: tuple[int, int, int, int], dtype: torch.dtype, *, is_neox: bool, turns_keys: bool = True) -> Problem:
    tokens, heads, dim, rotary_dim = sizes
    places = [turns_of(some_angles(rotary_dim, seed=token + 1), torch.device("cpu")) for token in range(tokens)]
    return Problem(
        random_values((2, tokens, heads, dim), dtype),
        random_values((2, tokens, heads, dim), dtype, seed=3),
        torch.stack(places) if places else torch.zeros(0, 2, rotary_dim // 2),
        turns_of(some_angles(rotary_dim), torch.device("cpu")) if turns_keys else None,
        is_neox,
    )


def exactly_shifted(given: Problem) -> torch.Tensor:
    """Oracle, fp64."""
    result = given.entry.double()
    if given.turns is not None:
        result[0] = exactly_turned(given.entry[0], given.turns, given.is_neox)
    for token, place in enumerate(given.places):
        result[0, token] += exactly_turned(given.shift[0, token], place, given.is_neox)
    result[1] += given.shift[1].double()
    return result


def check(implementation: Implementation, given: Problem) -> None:
    """Within the bound, and within twice the error that PyTorch makes in the same precision."""
    found, exact = given.solve(implementation), exactly_shifted(given)
    assert found.dtype == given.entry.dtype
    rotary_dim, pairs = 2 * given.places.shape[2], torch.zeros(exact.shape, dtype=torch.float64)
    pairs[0] = size_of_pairs(given.shift[0], rotary_dim, given.is_neox)
    if given.turns is not None:
        pairs[0] += size_of_pairs(given.entry[0], rotary_dim, given.is_neox)
    before_rounding = 2 * U32 * pairs + U32 * (exact.abs() + 2 * U32 * pairs)
    bound = before_rounding + rounding(exact.abs() + before_rounding, found.dtype)
    error = (found.double() - exact).abs()
    assert (error <= SLACK * bound).all(), f"{(error / bound).max():.3f} times the bound"
    by_torch = torch.empty_like(given.entry)
    ref.shift_rows(by_torch, given.entry, given.shift, given.places, given.turns, given.is_neox)
    assert error.max() <= 2 * (by_torch.double() - exact).abs().max()


@every_style
@every_dtype
@with_and_without_turns
def test_rows_move_within_the_rounding_of_their_type(
    implementation: Implementation, dtype: torch.dtype, is_neox: bool, turns_keys: bool
) -> None:
    check(implementation, problem((13, 3, 64, 64), dtype, is_neox=is_neox, turns_keys=turns_keys))


@every_style
@pytest.mark.parametrize("sizes", AWKWARD_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_awkward_sizes_move_like_others(
    implementation: Implementation, dtype: torch.dtype, sizes: tuple[int, int, int, int], is_neox: bool
) -> None:
    check(implementation, problem(sizes, dtype, is_neox=is_neox))


@every_style
def test_a_key_changes_as_it_was_before_its_position_turned_it(implementation: Implementation, is_neox: bool) -> None:
    """Keys of positions p that go to p + 7 with a change: the same keys, changed, then turned to p + 7."""
    tokens, heads, dim, delta = 11, 2, 64, 7
    frequencies = 1 / 1e4 ** (torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    keys, positions = random_values((tokens, heads, dim), torch.float64), torch.arange(tokens) * 5 + 100

    def at(rows: torch.Tensor, position: int) -> torch.Tensor:
        angles = frequencies * position
        return exactly_turned(rows, torch.stack((angles.cos(), angles.sin())), is_neox)

    stored = torch.stack([at(row, int(p)) for row, p in zip(keys, positions, strict=True)])
    change = random_values((2, tokens, heads, dim), torch.float32, seed=5)
    wanted = torch.stack([at(row, int(p) + delta) for row, p in zip(keys + change[0], positions, strict=True)])
    places = torch.stack([turns_of(frequencies * (int(p) + delta), torch.device("cpu")) for p in positions])
    turns = turns_of(frequencies * delta, torch.device("cpu"))
    entry = stored.float().expand(2, -1, -1, -1).contiguous()
    found = Problem(entry, change, places, turns, is_neox).solve(implementation)[0].double()
    # Four roundings of keys and of the change each: of cosine and sine, of what is given, and 2 u as above.
    pairs = size_of_pairs(stored, dim, is_neox) + size_of_pairs(change[0], dim, is_neox)
    assert ((found - wanted).abs() <= SLACK * (4 * U32 * pairs + 2 * U32 * wanted.abs())).all()


@every_style
@every_dtype
@pytest.mark.parametrize("dim", [64, 86])
def test_without_a_change_and_turns_every_value_stays(
    implementation: Implementation, dtype: torch.dtype, is_neox: bool, dim: int
) -> None:
    """Every finite value, that is; and of a zero the sign may not: -0 + 0 is +0."""
    given = problem((13, 3, dim, dim - 4), dtype, is_neox=is_neox, turns_keys=False)
    entry = random_bits(given.entry.shape, dtype)
    entry = torch.where(entry.float().isfinite(), entry.float(), 0.5).to(dtype)
    given.shift.zero_()
    found = given.solve(implementation, entry)
    assert torch.equal(found.float(), entry.float())
    assert torch.equal(as_bits(found)[entry.float() != 0], as_bits(entry)[entry.float() != 0])


@every_style
@every_dtype
@pytest.mark.parametrize("dim", [64, 86])
def test_turns_alone_give_what_load_rows_stores(
    implementation: Implementation, dtype: torch.dtype, is_neox: bool, dim: int
) -> None:
    """Bit for bit but for the sign of a zero, where products are exact: whoever rounds twice is found out."""
    given = problem((13, 3, dim, dim - 4), dtype, is_neox=is_neox)
    assert given.turns is not None
    generator = torch.Generator().manual_seed(21)
    given.entry.copy_(torch.randint(-15, 16, given.entry.shape, generator=generator))
    given.turns.copy_(torch.randint(-64, 65, given.turns.shape, generator=generator) / 64)
    given.shift.zero_()
    turns = given.turns.to(implementation.device)
    loaded = load_and_look(implementation, given.entry[None], turns, is_neox)[0]
    found = given.solve(implementation)
    assert torch.equal(found.float(), loaded.float())
    assert torch.equal(as_bits(found)[loaded.float() != 0], as_bits(loaded)[loaded.float() != 0])


@every_style
@every_dtype
@with_and_without_turns
@pytest.mark.parametrize("sizes", [(13, 3, 64, 64), *AWKWARD_SIZES], ids=str)
def test_an_entry_may_be_shifted_where_it_is(
    implementation: Implementation,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    is_neox: bool,
    turns_keys: bool,
) -> None:
    given = problem(sizes, dtype, is_neox=is_neox, turns_keys=turns_keys)
    wanted = given.solve(implementation)
    entry = given.entry.to(implementation.device)
    given.solve(implementation, entry, out=entry)
    assert torch.equal(as_bits(entry.cpu()), as_bits(wanted))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("sizes", [(171, 8, 128, 128), (700, 2, 64, 48)], ids=str)
def test_threads_share_the_tokens(implementation: Implementation, sizes: tuple[int, int, int, int]) -> None:
    check(implementation, problem(sizes, torch.bfloat16, is_neox=True))


@every_style
@pytest.mark.parametrize("dim", [64, 21])
def test_entry_changes_and_result_may_be_views_with_any_strides(
    implementation: Implementation, is_neox: bool, dim: int
) -> None:
    """Changes as a matrix product leaves them. And of the memory around the result nothing changes."""
    given = problem((5, 3, dim, dim // 2 * 2), torch.bfloat16, is_neox=is_neox)
    memory = random_bits((3, 2 * 7, 2, dim + 3), torch.bfloat16).to(implementation.device)
    entry = torch.zeros(5 + 1, 3, 2, dim + 5, dtype=torch.bfloat16, device=implementation.device)
    read = entry[1:, :, :, 2:-3].permute(2, 0, 1, 3)
    read.copy_(given.entry)
    write = memory[:, 2:-2:2, :, 1:-2].permute(2, 1, 0, 3)
    assert read.shape == write.shape == given.entry.shape
    wanted = memory.clone()
    wanted[:, 2:-2:2, :, 1:-2] = given.solve(implementation).permute(2, 1, 0, 3).to(implementation.device)
    products = given.shift.transpose(0, 1).contiguous().to(implementation.device)
    replace(given, shift=products.transpose(0, 1)).solve(implementation, read, out=write)
    assert torch.equal(as_bits(memory), as_bits(wanted))


@every_style
@every_dtype
@pytest.mark.parametrize("dim", [64, 21])
def test_one_change_may_serve_all_tokens(
    implementation: Implementation, dtype: torch.dtype, is_neox: bool, dim: int
) -> None:
    given = problem((13, 3, dim, dim // 2 * 2), dtype, is_neox=is_neox)
    expanded = replace(given, shift=given.shift[:, 4:5].expand_as(given.shift))
    repeated = replace(given, shift=expanded.shift.contiguous())
    assert torch.equal(as_bits(expanded.solve(implementation)), as_bits(repeated.solve(implementation)))


@pytest.mark.parametrize("dim", [64, 20])
def test_nothing_is_written_around_the_result(implementation: Implementation, dim: int) -> None:
    given = problem((13, 3, dim, dim), torch.bfloat16, is_neox=True)
    count, guard = given.entry.numel(), 64
    memory = random_bits((count + 2 * guard,), torch.bfloat16).to(implementation.device)
    before = as_bits(memory).clone()
    given.solve(implementation, out=memory[guard:-guard].view(given.entry.shape))
    assert torch.equal(as_bits(memory)[:guard], before[:guard])
    assert torch.equal(as_bits(memory)[-guard:], before[-guard:])
    assert not torch.equal(as_bits(memory), before)


@pytest.mark.parametrize("sizes", [(0, 3, 64, 64), (5, 0, 64, 64), (5, 3, 0, 0)], ids=str)
def test_nothing_to_move_is_no_error(implementation: Implementation, sizes: tuple[int, int, int, int]) -> None:
    given = problem(sizes, torch.bfloat16, is_neox=True)
    assert given.solve(implementation).shape == given.entry.shape


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_eight_bit_entries_saturate(implementation: Implementation, dtype: torch.dtype) -> None:
    given = problem((13, 3, 64, 64), dtype, is_neox=True, turns_keys=False)
    largest = torch.finfo(dtype).max
    given.shift.copy_(given.shift.float().sign() * largest)
    found = given.solve(implementation, given.shift)[1]
    assert torch.equal(as_bits(found), as_bits(given.shift[1]))


def test_the_operation_passes_the_checks_of_torch(implementation: Implementation) -> None:
    if not implementation.is_native:
        return
    sizes, device = Sizes(), implementation.device
    entry = random_values(sizes.entry_shape[1:], torch.bfloat16).to(device)
    shift = torch.ones_like(entry)
    places = torch.zeros(sizes.tokens, 2, sizes.dim // 2, device=device)
    turns = torch.zeros(2, sizes.dim // 2, device=device)
    for given in (turns, None):
        arguments = torch.empty_like(entry), entry, shift, places, given, True
        torch.library.opcheck(torch.ops.vlcache.shift_rows, arguments)
