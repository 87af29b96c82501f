"""Re-positioning of keys against a scalar loop in double precision and against transformers' own rotary code.

Bounds are first-order rounding analysis. `u` is the unit roundoff of fp32. One member of a turned pair is
x cos - y sin: cos and sin are rounded to fp32, the products are rounded, their sum is rounded, so it is off by at most
3 u (|x| + |y|). Terms of second order are covered by a slack of one percent.
"""

import math
from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from vlcache_connector.errors import PositionMismatchError
from vlcache_connector.exec.rope import Rope, position_delta
from vlcache_connector.kernels.ops import PageLayout, Strides, load_rows

HEAD_DIM = 64
SLACK = 1.01
U32 = torch.finfo(torch.float32).eps / 2
DELTAS = [1, -1, 17, 1600, -3001, 10**6, -(10**6) - 1]

every_style = pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_delta = pytest.mark.parametrize("delta", DELTAS)


def rope_of(is_neox: bool, rotary_dim: int = HEAD_DIM, base: float = 1e6) -> Rope:
    inv_freq = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    return Rope(inv_freq, is_neox)


def random_keys(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(rope: Rope, keys: torch.Tensor, delta: int) -> torch.Tensor:
    """Keys [..., head_dim] as a load moves them, seen through pages of one block and one head."""
    rows = keys.reshape(-1, 1, keys.shape[-1])
    pages = torch.zeros(1, 2, *rows.shape, dtype=keys.dtype)
    layout = PageLayout.alike(len(rows), Strides(0, rows.shape[-1], rows.shape[-1], 1), rows.numel())
    turns = rope.turns(delta, keys.device) if delta else None
    entry = torch.stack((rows, rows))[None]
    load_rows(entry, [pages], torch.arange(len(rows)), layout, turns=turns, is_neox=rope.is_neox)
    assert torch.equal(pages[0, 1].view(torch.uint8), rows.contiguous().view(torch.uint8)), "values are copied"
    return pages[0, 0].reshape(keys.shape)


def pairs(rope: Rope) -> list[tuple[int, int]]:
    half = rope.inv_freq.numel()
    return [(i, i + half) if rope.is_neox else (2 * i, 2 * i + 1) for i in range(half)]


def turned_by_a_loop(rope: Rope, keys: torch.Tensor, delta: int) -> torch.Tensor:
    """Oracle: pair by pair, in Python's doubles."""
    rows: list[list[float]] = keys.reshape(-1, keys.shape[-1]).double().tolist()
    for row in rows:
        for (i, j), frequency in zip(pairs(rope), rope.inv_freq.double().tolist(), strict=True):
            cos, sin = math.cos(frequency * delta), math.sin(frequency * delta)
            row[i], row[j] = row[i] * cos - row[j] * sin, row[j] * cos + row[i] * sin
    return torch.tensor(rows, dtype=torch.float64).view(keys.shape)


def pair_size(rope: Rope, keys: torch.Tensor) -> torch.Tensor:
    """|x| + |y| of the pair that each element belongs to; 0 where nothing is rotated."""
    size = torch.zeros(keys.shape, dtype=torch.float64)
    for i, j in pairs(rope):
        size[..., i] = size[..., j] = keys[..., i].double().abs() + keys[..., j].double().abs()
    return size


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bound of one rounding to `dtype`: half a unit in the last place, also where numbers are subnormal."""
    info = torch.finfo(dtype)
    return (exact.abs() * info.eps / 2).clamp(min=info.smallest_normal * info.eps / 2)


# -- oracle 1: a loop -------------------------------------------------------------------------------------------------


@every_style
@every_dtype
@every_delta
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 24, 2])
def test_keys_turn_as_a_loop_in_double_precision_turns_them(
    is_neox: bool, dtype: torch.dtype, delta: int, rotary_dim: int
) -> None:
    rope = rope_of(is_neox, rotary_dim)
    keys = random_keys(5, 2, HEAD_DIM, dtype=dtype)
    exact = turned_by_a_loop(rope, keys, delta)
    in_fp32 = SLACK * 3 * U32 * pair_size(rope, keys)
    bound = in_fp32 + rounding(exact.abs() + in_fp32, dtype) if dtype != torch.float32 else in_fp32
    error = (moved(rope, keys, delta).double() - exact).abs()
    assert bool((error <= bound).all()), f"{(error / bound.clamp(min=1e-300)).max()} times the bound"


@every_style
def test_angles_in_fp32_would_miss_the_bound_at_large_deltas(is_neox: bool) -> None:
    """The bound above must be able to tell: an angle of 1e6 radians in fp32 is off by up to 1e6 u, not by u."""
    rope, delta = rope_of(is_neox), 10**6 + 1
    keys = random_keys(5, 2, HEAD_DIM)
    angle = rope.inv_freq * delta  # rounded to fp32
    coarse = Rope((angle.double() / delta).to(torch.float64), is_neox)
    error = (moved(coarse, keys, delta).double() - turned_by_a_loop(rope, keys, delta)).abs()
    assert bool((error > SLACK * 3 * U32 * pair_size(rope, keys)).any())


# -- oracle 2: transformers -------------------------------------------------------------------------------------------

ROPE_PARAMETERS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]}
FAMILIES: dict[str, tuple[Any, Any, Any]] = {  # M-RoPE in contiguous sections, and interleaved
    "qwen2_5_vl": (qwen2_5, qwen2_5.Qwen2_5_VLRotaryEmbedding, qwen2_5.Qwen2_5_VLTextConfig),
    "qwen3_vl": (qwen3, qwen3.Qwen3VLTextRotaryEmbedding, qwen3.Qwen3VLTextConfig),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def image_positions(start: int) -> torch.Tensor:
    """Positions [3, tokens] of an image of 2 x 4 x 3 tokens."""
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(3))
    return start + grid.T


class Transformers:
    """What a model of transformers does with keys [tokens, heads, dim] at positions [3, tokens]."""

    def __init__(self, family: str) -> None:
        self._module, rotary, config = FAMILIES[family]
        self._rotary = rotary(config(head_dim=HEAD_DIM, rope_parameters=ROPE_PARAMETERS))

    @property
    def rope(self) -> Rope:
        return Rope(self._rotary.inv_freq, is_neox=True)

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self._rotary(keys, positions[:, None])
        batch = keys[None]
        _, turned = self._module.apply_rotary_pos_emb(batch, batch, cos, sin, unsqueeze_dim=2)
        rows: torch.Tensor = turned[0]
        return rows

    def rotate_exactly(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The same in double precision, by the loop: each frequency turns by the channel it belongs to."""
        probe = torch.zeros(len(keys), 1, HEAD_DIM)
        channels = [self.rotate_probe(probe, positions, channel) for channel in range(3)]
        out = keys.double().clone()
        half = HEAD_DIM // 2
        for i in range(half):
            (channel,) = [c for c in range(3) if channels[c][i]]
            angle = positions[channel].double()[:, None] * self.rope.inv_freq[i].double()
            x, y = keys[..., i].double(), keys[..., i + half].double()
            out[..., i], out[..., i + half] = x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()
        return out

    def rotate_probe(self, probe: torch.Tensor, positions: torch.Tensor, channel: int) -> list[bool]:
        """Whether each frequency follows the position channel."""
        at = torch.zeros_like(positions)
        at[channel] = 1
        _, sin = self._rotary(probe, at[:, None])
        return [bool(sin[0, 0, i] != 0) for i in range(HEAD_DIM // 2)]


@every_family
@pytest.mark.parametrize("delta", [1, -40, 700, 30000])
def test_moved_keys_are_the_keys_that_transformers_makes_at_the_new_place(family: str, delta: int) -> None:
    """fp32, M-RoPE. S = |x| + |y|. In transformers an angle t is rounded to fp32 (u t), its sine and cosine are good to
    one unit in the last place (2 u), so a run of it is off by (4 u + u t) S. Turning a pair spreads its error over both
    members (sqrt 2), and our own 3 u S is of a pair whose S has grown by as much.
    """
    model, start = Transformers(family), 50
    positions = image_positions(start)
    raw = random_keys(positions.shape[1], 2, HEAD_DIM)
    found = moved(model.rope, model.rotate(raw, positions), delta)
    wanted = model.rotate(raw, positions + delta)
    size = pair_size(model.rope, raw)
    frequency = torch.cat((model.rope.inv_freq, model.rope.inv_freq)).double()
    farthest = int(positions.max())
    at_start, at_end = (4 * U32 + U32 * frequency * p for p in (farthest, abs(farthest + delta)))
    bound = SLACK * size * (at_end + math.sqrt(2) * at_start + math.sqrt(2) * 3 * U32)
    error = (found.double() - wanted.double()).abs()
    assert bool((error <= bound).all()), f"{(error / bound).max()} times the bound"


@every_family
def test_the_exact_twin_of_transformers_agrees_with_it(family: str) -> None:
    """Same bound as above for one run: (4 u + u t) S."""
    model, positions = Transformers(family), image_positions(50)
    raw = random_keys(positions.shape[1], 2, HEAD_DIM)
    error = (model.rotate(raw, positions).double() - model.rotate_exactly(raw, positions)).abs()
    frequency = torch.cat((model.rope.inv_freq, model.rope.inv_freq)).double()
    assert bool((error <= SLACK * pair_size(model.rope, raw) * (4 * U32 + U32 * frequency * positions.max())).all())


@every_family
@pytest.mark.parametrize("delta", [1, -40, 700])
def test_in_bf16_moving_costs_at_most_as_much_again_as_computing_at_the_new_place(family: str, delta: int) -> None:
    model, positions = Transformers(family), image_positions(50)
    raw = random_keys(positions.shape[1], 8, HEAD_DIM, dtype=torch.bfloat16)
    exact = model.rotate_exactly(raw, positions + delta)
    found = moved(model.rope, model.rotate(raw, positions), delta)
    computed = model.rotate(raw, positions + delta)
    error, error_of_same_precision = ((k.double() - exact).abs() for k in (found, computed))
    assert error.max() <= 2 * error_of_same_precision.max()
    assert error.square().mean() <= 4 * error_of_same_precision.square().mean()


@every_family
def test_one_rotation_in_bf16_is_at_least_as_good_as_transformers_in_bf16(family: str) -> None:
    """From position 0, where both do the same work once: turned in fp32 and rounded once, against bf16 throughout."""
    model, delta = Transformers(family), 333
    raw = random_keys(24, 8, HEAD_DIM, dtype=torch.bfloat16)
    origin = torch.zeros(3, 24, dtype=torch.int64)
    exact = model.rotate_exactly(raw, origin + delta)
    error = (moved(model.rope, raw, delta).double() - exact).abs().max()
    assert error <= (model.rotate(raw, origin + delta).double() - exact).abs().max()


# -- algebra ----------------------------------------------------------------------------------------------------------


@every_style
@every_dtype
def test_a_move_by_nothing_keeps_every_bit(is_neox: bool, dtype: torch.dtype) -> None:
    keys = random_keys(5, 2, HEAD_DIM, dtype=dtype)
    assert torch.equal(moved(rope_of(is_neox), keys, 0).view(torch.uint8), keys.view(torch.uint8))


@every_style
@pytest.mark.parametrize(("a", "b"), [(1, 2), (100, -100), (-7, 5000), (10**6, -999_983), (123_456, 654_321)])
def test_two_moves_are_one_move_by_their_sum(is_neox: bool, a: int, b: int) -> None:
    """The first move's 3 u S is spread by the second (sqrt 2), whose own S is larger by sqrt 2; the sum costs 3 u S."""
    rope, keys = rope_of(is_neox), random_keys(7, 3, HEAD_DIM)
    error = (moved(rope, moved(rope, keys, a), b).double() - moved(rope, keys, a + b).double()).abs()
    assert bool((error <= SLACK * (1 + 2 * math.sqrt(2)) * 3 * U32 * pair_size(rope, keys)).all())


@every_style
def test_moving_there_and_back_returns_to_the_start(is_neox: bool) -> None:
    """As above, without a rounding in the reference."""
    rope, keys = rope_of(is_neox), random_keys(7, 3, HEAD_DIM)
    error = (moved(rope, moved(rope, keys, 4321), -4321).double() - keys.double()).abs()
    assert bool((error <= SLACK * 2 * math.sqrt(2) * 3 * U32 * pair_size(rope, keys)).all())


@every_dtype
def test_both_styles_are_one_rotation_under_two_orders_of_dimensions(dtype: torch.dtype) -> None:
    keys = random_keys(5, 2, HEAD_DIM, dtype=dtype)
    interleaved = torch.arange(HEAD_DIM).view(2, -1).T.flatten()  # 0, 32, 1, 33, ...
    neox, gptj = rope_of(is_neox=True), rope_of(is_neox=False)
    assert torch.equal(moved(neox, keys, 99)[..., interleaved], moved(gptj, keys[..., interleaved], 99))


@every_style
@every_dtype
@pytest.mark.parametrize("rotary_dim", [2, 24, 62])
def test_dimensions_behind_the_rotary_ones_are_copied_bit_for_bit(
    is_neox: bool, dtype: torch.dtype, rotary_dim: int
) -> None:
    rope, width = rope_of(is_neox, rotary_dim), HEAD_DIM * dtype.itemsize
    bits = torch.randint(256, (5, 2, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys = bits.view(dtype)  # NaN and infinities included
    assert rope.rotary_dim == rotary_dim
    skipped = rotary_dim * dtype.itemsize
    assert torch.equal(moved(rope, keys, 5).view(torch.uint8)[..., skipped:], bits[..., skipped:])


@every_style
@every_dtype
def test_a_move_keeps_shape_and_dtype_and_its_argument(is_neox: bool, dtype: torch.dtype) -> None:
    keys = random_keys(2, 3, 5, HEAD_DIM, dtype=dtype)
    before = keys.clone()
    turned = moved(rope_of(is_neox, 24), keys, 12)
    assert (turned.shape, turned.dtype) == (keys.shape, dtype)
    assert torch.equal(keys, before)
    assert not torch.equal(turned, keys)


# -- the one delta of a span ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0, 1, -1, 5000, -5000])
@pytest.mark.parametrize("stored_dtype", [torch.int32, torch.int64])
def test_the_delta_of_a_span_is_how_far_all_its_positions_moved(delta: int, stored_dtype: torch.dtype) -> None:
    stored = image_positions(9000)
    found = position_delta(stored.to(stored_dtype), stored + delta)
    assert found == delta
    assert type(found) is int


def test_a_delta_may_be_wider_than_the_stored_integers() -> None:
    stored = torch.full((3, 2), -(2**31), dtype=torch.int32)
    assert position_delta(stored, torch.full((3, 2), 2**31 - 1)) == 2**32 - 1


@pytest.mark.parametrize("channel", range(3))
def test_channels_that_moved_by_different_amounts_are_refused(channel: int) -> None:
    stored = image_positions(10)
    wanted = stored + 100
    wanted[channel] += 1
    with pytest.raises(PositionMismatchError, match="100 to 101"):
        position_delta(stored, wanted)


@pytest.mark.parametrize("token", [0, 11, 23])
def test_a_single_token_that_moved_differently_is_refused(token: int) -> None:
    stored = image_positions(10)
    wanted = stored - 4
    wanted[1, token] -= 1
    with pytest.raises(PositionMismatchError, match="-5 to -4"):
        position_delta(stored, wanted)


def test_an_image_of_another_shape_is_refused() -> None:
    stored = image_positions(10)
    transposed = 10 + torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).T
    with pytest.raises(PositionMismatchError):
        position_delta(stored, transposed)
