"""load_rows with rotation, against complex multiplication in double precision and against transformers' rotary code.

Bounds are first-order rounding analysis. `u` is the unit roundoff of fp32: one member of a turned pair is
x cos - y sin, whose two products and their difference are rounded, so it is off by at most 2 u (|x| + |y|), whether or
not a product is fused with the difference. What is stored is then rounded once, by half a unit in the last place. Terms
of second order are covered by a slack of one percent.
"""

import math

import pytest
import torch

from kernels.conftest import Implementation
from kernels.paged import DTYPES, FLOAT8, Sizes, as_bits, kept_tokens, paged, random_bits, random_values, some_slots

SLACK = 1.01
U32 = torch.finfo(torch.float32).eps / 2

every_style = pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
some_forms = pytest.mark.parametrize("form", ["engine", "kv_then_tokens", "dim_strided", "packed"])

ROTARY_DIMS = [(20, 20), (20, 12), (20, 2), (20, 0), (64, 64), (80, 80), (96, 48), (112, 112), (128, 128), (33, 32)]


def turns_of(angles: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[2, rotary_dim / 2] from angles in fp64."""
    return torch.stack((angles.cos(), angles.sin())).float().to(device)


def some_angles(rotary_dim: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rotary_dim // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 7 - 3.5


def split(keys: torch.Tensor, rotary_dim: int, is_neox: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second members of all pairs."""
    half = rotary_dim // 2
    firsts = torch.arange(half) * (1 if is_neox else 2)
    seconds = firsts + (half if is_neox else 1)
    return keys[..., firsts], keys[..., seconds]


def joined(x: torch.Tensor, y: torch.Tensor, like: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """The inverse of `split`, the dimensions behind the pairs from `like`."""
    half, result = x.shape[-1], like.clone()
    firsts = torch.arange(half) * (1 if is_neox else 2)
    result[..., firsts], result[..., firsts + (half if is_neox else 1)] = x, y
    return result


def exactly_turned(keys: torch.Tensor, turns: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Oracle: keys times cos + i sin as complex numbers, fp64. It uses the cosines and sines that the operation got."""
    cos, sin = turns.cpu().double()
    x, y = split(keys.double(), 2 * len(cos), is_neox)
    turned = torch.complex(x, y) * torch.complex(cos, sin)
    return joined(turned.real, turned.imag, keys.double(), is_neox)


def size_of_pairs(keys: torch.Tensor, rotary_dim: int, is_neox: bool) -> torch.Tensor:
    """|x| + |y| at both members of each pair, 0 behind them."""
    x, y = split(keys.double().abs(), rotary_dim, is_neox)
    return joined(x + y, x + y, torch.zeros(keys.shape, dtype=torch.float64), is_neox)


def rounding(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of `values` in `dtype`, or of the smallest normal number."""
    finfo = torch.finfo(dtype)
    return finfo.eps / 2 * values.abs().clamp(min=finfo.smallest_normal)


def load_and_look(
    implementation: Implementation,
    entry: torch.Tensor,
    turns: torch.Tensor | None,
    is_neox: bool,
    form: str = "engine",
    dtype: torch.dtype | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows [layers, 2, tokens, heads, dim] of fresh pages after a load. Checks that nothing beside them was written."""
    layers, _, tokens, heads, dim = entry.shape
    sizes = Sizes(layers, tokens, heads, dim)
    pages = paged(form, sizes, dtype or entry.dtype, implementation.device)
    slots = some_slots(sizes, num_skipped=0)
    implementation.load_rows(
        entry.to(implementation.device),
        pages.caches,
        slots.to(implementation.device),
        pages.layout,
        turns=turns,
        is_neox=is_neox,
        scales=scales,
    )
    kept, before = kept_tokens(slots), paged(form, sizes, dtype or entry.dtype, implementation.device)
    rows = [pages.rows(layer, kept, slots) for layer in range(layers)]
    for layer in range(layers):
        assert torch.equal(before.with_rows(layer, kept, slots, as_bits(rows[layer])), pages.memory[layer].cpu())
    return torch.stack([as_bits(row) for row in rows]).view(dtype or entry.dtype)


@every_style
@every_dtype
@some_forms
def test_keys_turn_within_the_rounding_of_their_type(
    implementation: Implementation, form: str, dtype: torch.dtype, is_neox: bool
) -> None:
    entry = random_values(Sizes().entry_shape, dtype)
    turns = turns_of(some_angles(entry.shape[-1]), implementation.device)
    check_turned(implementation, entry, turns, is_neox, form)


@every_style
@pytest.mark.parametrize(("dim", "rotary_dim"), ROTARY_DIMS)
def test_dimensions_past_the_rotary_ones_are_copied(
    implementation: Implementation, dim: int, rotary_dim: int, is_neox: bool
) -> None:
    entry = random_values(Sizes(dim=dim).entry_shape, torch.bfloat16)
    rest = random_bits((*entry.shape[:-1], dim - rotary_dim), torch.bfloat16)
    as_bits(entry)[..., rotary_dim:] = as_bits(rest)
    turns = turns_of(some_angles(rotary_dim), implementation.device)
    found = load_and_look(implementation, entry, turns, is_neox)
    assert torch.equal(as_bits(found)[..., rotary_dim:], as_bits(rest))
    check_turned(implementation, entry[..., :rotary_dim].contiguous(), turns, is_neox, "engine")


def check_turned(
    implementation: Implementation, entry: torch.Tensor, turns: torch.Tensor, is_neox: bool, form: str
) -> None:
    """Values are copied, keys turned within their bound, and within twice the error that PyTorch makes."""
    found = load_and_look(implementation, entry, turns, is_neox, form)
    assert torch.equal(as_bits(found[:, 1].contiguous()), as_bits(entry[:, 1].contiguous()))
    keys, rotary_dim = entry[:, 0], 2 * turns.shape[1]
    if keys.numel() == 0:
        return
    exact = exactly_turned(keys, turns, is_neox)
    before_rounding = 2 * U32 * size_of_pairs(keys, rotary_dim, is_neox)
    bound = before_rounding + rounding(exact.abs() + before_rounding, entry.dtype)
    error = (found[:, 0].double() - exact).abs()
    assert (error <= SLACK * bound).all(), f"{(error / bound).max():.3f} times the bound"
    torchs = (turned_in_torch(keys, turns.cpu(), is_neox).double() - exact).abs()
    assert error.max() <= 2 * torchs.max()


def turned_in_torch(keys: torch.Tensor, turns: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """The same precision in PyTorch: fp32, rounded once."""
    x, y = split(keys.float(), 2 * turns.shape[1], is_neox)
    cos, sin = turns
    return joined(x * cos - y * sin, y * cos + x * sin, keys.float(), is_neox).to(keys.dtype)


@every_style
def test_each_section_of_the_frequencies_may_move_by_its_own_delta(
    implementation: Implementation, is_neox: bool
) -> None:
    """M-RoPE: frequencies belong to time, height or width; here they move by 5, -3 and 11 positions."""
    dim = 64
    frequencies = 1 / 1e4 ** (torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    delta = torch.tensor([5] * 8 + [-3] * 12 + [11] * 12)
    entry = random_values(Sizes(dim=dim).entry_shape, torch.float32)
    turns = turns_of(frequencies * delta, implementation.device)
    found = load_and_look(implementation, entry, turns, is_neox)[:, 0]
    keys = entry[:, 0]
    for pair in range(dim // 2):
        angle = float(frequencies[pair]) * int(delta[pair])
        x, y = (member[..., pair].double() for member in split(keys, dim, is_neox))
        a, b = (member[..., pair].double() for member in split(found, dim, is_neox))
        bound = SLACK * 3 * U32 * (x.abs() + y.abs())  # cosines and sines are rounded as well
        assert ((a - (x * math.cos(angle) - y * math.sin(angle))).abs() <= bound).all()
        assert ((b - (y * math.cos(angle) + x * math.sin(angle))).abs() <= bound).all()


@every_style
@every_dtype
def test_a_turn_by_zero_changes_nothing(implementation: Implementation, dtype: torch.dtype, is_neox: bool) -> None:
    """Without turns every bit stays (see test_rows.py). With cosine 1 and sine 0 every finite value does; only the sign
    of a zero may not: -0 - (-0) is +0.
    """
    shape = Sizes(dim=64).entry_shape
    entry = random_bits(shape, dtype)
    entry = torch.where(entry.float().isfinite(), entry.float(), 0.5).to(dtype)
    turns = turns_of(torch.zeros(32, dtype=torch.float64), implementation.device)
    found = load_and_look(implementation, entry, turns, is_neox)
    assert torch.equal(found.float(), entry.float())
    assert torch.equal(as_bits(found)[entry.float() != 0], as_bits(entry)[entry.float() != 0])


@every_style
@every_dtype
def test_what_is_not_a_number_stays_so(implementation: Implementation, dtype: torch.dtype, is_neox: bool) -> None:
    """Also a NaN whose lower bits are all set, which adding for the rounding would carry over into a zero."""
    dim = 64
    entry = random_values(Sizes(dim=dim).entry_shape, dtype)
    turns = torch.full((2, dim // 2), 0.6)
    turns.view(torch.int32)[0, 3] = 0x7FFFFFFF
    found = load_and_look(implementation, entry, turns.to(implementation.device), is_neox)[:, 0]
    is_nan = [member.float().isnan() for member in split(found, dim, is_neox)]
    for member in is_nan:
        assert member[..., 3].all()
        assert not member[..., :3].any() and not member[..., 4:].any()


@every_style
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_turns_are_one_turn_by_their_sum(implementation: Implementation, dtype: torch.dtype, is_neox: bool) -> None:
    entry = random_values(Sizes(dim=64).entry_shape, dtype)
    angles = some_angles(64, seed=1), some_angles(64, seed=2)
    first, second, both = (turns_of(angle, implementation.device) for angle in (*angles, angles[0] + angles[1]))
    once = load_and_look(implementation, entry, both, is_neox)
    twice = load_and_look(implementation, load_and_look(implementation, entry, first, is_neox), second, is_neox)
    pairs = size_of_pairs(entry[:, 0], 64, is_neox)
    # A turn is off by 3 u (|x| + |y|), its cosine and sine rounded as well, and by the rounding of what is stored. Of
    # two turns the second one turns the error of the first (the errors of a pair add up) and has a pair of its own,
    # for which |x| + |y| may be larger by the square root of 2.
    one_turn = 3 * U32 * pairs + rounding(pairs, dtype)
    bound = one_turn + 2 * one_turn + (3 * math.sqrt(2) * U32 * pairs + rounding(pairs, dtype))
    assert ((once[:, 0].double() - twice[:, 0].double()).abs() <= SLACK * bound).all()


@every_style
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_keys_for_scaled_pages_are_turned_and_rounded_once(
    implementation: Implementation, dtype: torch.dtype, is_neox: bool
) -> None:
    entry = random_values(Sizes().entry_shape, torch.bfloat16)
    layers = len(entry)
    scales = torch.tensor([[0.013, 0.4], [0.21, 0.03]], device=implementation.device)
    turns = turns_of(some_angles(entry.shape[-1]), implementation.device)
    found = load_and_look(implementation, entry, turns, is_neox, dtype=dtype, scales=scales)
    exact = torch.stack((exactly_turned(entry[:, 0], turns, is_neox), entry[:, 1].double()), dim=1)
    pairs = torch.stack((size_of_pairs(entry[:, 0], entry.shape[-1], is_neox), torch.zeros(exact[:, 1].shape)), dim=1)
    scale = scales.cpu().double().view(layers, 2, 1, 1, 1)
    wanted = (exact / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    before_rounding = (2 * U32 * pairs + U32 * exact.abs()) / scale  # the division is rounded, too
    bound = before_rounding + rounding(wanted.abs() + before_rounding, dtype)
    assert ((found.double() - wanted).abs() <= SLACK * bound).all()


def test_transformers_turns_keys_the_same_way(implementation: Implementation) -> None:
    """A key that was computed at position p and is moved by delta must be the key at p + delta."""
    reason = "transformers is not installed: its rotary code is the oracle (pip install transformers)"
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl", reason=reason)
    dim, tokens, delta = 64, 13, 1234
    frequencies = 1 / 1e6 ** (torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)

    def at(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(positions.double(), frequencies)
        cos, sin = (torch.cat((part, part), dim=-1)[None] for part in (angles.cos(), angles.sin()))
        turned: torch.Tensor = modeling.apply_rotary_pos_emb(keys[None], keys[None], cos, sin)[1][0]
        return turned

    keys = random_values((3, tokens, dim), torch.float64)  # [heads, tokens, dim]
    before, wanted = at(keys, torch.arange(tokens)), at(keys, torch.arange(tokens) + delta)
    entry = before.transpose(0, 1).float().expand(1, 2, tokens, 3, dim).contiguous()
    turns = turns_of(frequencies * delta, implementation.device)
    found = load_and_look(implementation, entry, turns, is_neox=True)[0, 0].transpose(0, 1).double()
    # 2 u as above; cosines and sines are rounded, and so are the keys in the entry.
    bound = 4 * U32 * size_of_pairs(before, dim, is_neox=True)
    assert ((found - wanted).abs() <= SLACK * bound).all()
