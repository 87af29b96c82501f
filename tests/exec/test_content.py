"""Which tokens stand for a span, and how far the others are like those: against brute force and least squares."""

import random

import pytest
import torch

from exec import ridge
from vlcache_connector.exec.content import features, order_of, weights
from vlcache_connector.types import MAX_ORDERED

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entry_of(values: torch.Tensor, num_layers: int = 3) -> torch.Tensor:
    """An entry [layers, 2, tokens, 1, dim] with these values [tokens, dim] in all layers, and keys of all kinds."""
    entry = randn(num_layers, 2, len(values), 1, values.shape[1], seed=9).to(values.dtype)
    entry[:, 1, :, 0] = values
    return entry


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "used"),
    [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (28, 13)],
)
@every_dtype
def test_features_are_values_of_the_layer_in_the_middle(num_layers: int, used: int, dtype: torch.dtype) -> None:
    entry = randn(num_layers, 2, 5, 2, 3).to(dtype)
    rows = features(entry, CPU)
    assert rows.tolist() == [entry[used, 1, token].flatten().tolist() for token in range(5)]
    assert rows.dtype == dtype


# -- order ------------------------------------------------------------------------------------------------------------


def farthest_first(points: list[list[float]]) -> list[int]:
    """By brute force: the one nearest to the mean, then always the one that is farthest from its nearest before it."""

    def distance(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    mean = [sum(axis) / len(points) for axis in zip(*points, strict=True)]
    order = [min(range(len(points)), key=lambda token: distance(points[token], mean))]
    while len(order) < len(points):
        left = [token for token in range(len(points)) if token not in order]
        order.append(max(left, key=lambda token: min(distance(points[token], points[other]) for other in order)))
    return order


@pytest.mark.parametrize("seed", range(20))
def test_on_a_line_the_order_is_farthest_first(seed: int) -> None:
    """Of one layer with one number per token, projections keep distances: times eight, all of them."""
    rng = random.Random(seed)
    values = rng.sample(range(-10000, 10000), rng.choice([1, 3, 10, 40]))  # no ties, and no rounding that makes one
    rng.shuffle(values)
    entry = entry_of(torch.tensor(values)[:, None] + rng.random() / 64, num_layers=1).double().float()
    points: list[list[float]] = entry[0, 1, :, 0].double().tolist()
    assert order_of(entry, CPU).tolist() == farthest_first(points)


@pytest.mark.parametrize("seed", range(5))
@every_dtype
def test_each_kind_of_token_is_met_once_before_any_is_met_again(seed: int, dtype: torch.dtype) -> None:
    """Kinds differ by much more than tokens of a kind do, and than projections may be off."""
    rng = random.Random(seed)
    kinds = [rng.randrange(12) for _ in range(200)]
    values = randn(12, 96, seed=seed)[kinds] + 0.02 * randn(200, 96, seed=seed + 1)
    found = [kinds[token] for token in order_of(entry_of(values.to(dtype)), CPU).tolist()]
    num_kinds = len(set(kinds))
    assert len(set(found[:num_kinds])) == num_kinds


@pytest.mark.parametrize("seed", range(5))
def test_each_token_is_nearly_the_farthest_from_those_before_it(seed: int) -> None:
    """Sixty-four random signs keep a squared distance within a factor of 1 +- 4 sqrt(2 / 64), four times its standard
    deviation (that of a mean of 64 squares of nearly normal numbers), so the choice loses no more than both ends of it.
    """
    entry = randn(4, 2, 150, 2, 16, seed=seed) * torch.linspace(0.2, 2, 150).view(-1, 1, 1)
    rows, order = features(entry, CPU).double(), order_of(entry, CPU).tolist()
    off = 4 * (2 / 64) ** 0.5
    apart = torch.cdist(rows, rows).square()
    for number in range(1, len(order)):
        nearest = apart[:, order[:number]].amin(1)
        assert nearest[order[number]] >= (1 - off) / (1 + off) * nearest.max()


def test_the_first_token_is_the_most_ordinary_one() -> None:
    values = randn(50, 32) + 5
    values[17] = values[torch.arange(50) != 17].mean(0)
    assert order_of(entry_of(values), CPU)[0] == 17


def test_keys_and_other_layers_do_not_count() -> None:
    entry = randn(6, 2, 40, 2, 8)
    before = order_of(entry, CPU)
    entry[:, 0], entry[[0, 1, 3, 4, 5]] = 7 * randn(40, 2, 8, seed=1), 9 * randn(2, 40, 2, 8, seed=2)
    assert torch.equal(order_of(entry, CPU), before)
    entry[2, 1] = randn(40, 2, 8, seed=3)
    assert not torch.equal(order_of(entry, CPU), before)


def test_what_all_tokens_have_in_common_does_not_count() -> None:
    values = torch.randint(-50, 50, (40, 32), generator=torch.Generator().manual_seed(0)).float()
    order = order_of(entry_of(values), CPU)
    assert torch.equal(order_of(entry_of(values + 4096), CPU), order)


def test_where_a_token_stands_does_not_count() -> None:
    entry, moved = randn(3, 2, 60, 2, 8), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(moved[order_of(entry[:, :, moved], CPU).long()], order_of(entry, CPU).long())


def test_an_order_is_the_same_each_time_and_leaves_the_random_state_alone() -> None:
    entry, state = randn(3, 2, 60, 2, 8), torch.get_rng_state()
    order = order_of(entry, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(order_of(entry, CPU), order)
    torch.set_rng_state(state)


def spoilt(name: str, num_tokens: int) -> torch.Tensor:
    values = randn(num_tokens, 8)
    some = torch.arange(num_tokens) % 3 == 1
    return {
        "different": values,
        "equal": torch.ones_like(values),
        "zero": torch.zeros_like(values),
        "two kinds": values[some.long()],
        "all NaN": torch.full_like(values, torch.nan),
        "some NaN": values.masked_fill(some[:, None], torch.nan),
        "some infinite": values.masked_fill(some[:, None], -torch.inf),
        "squares overflow": values * 1e30,
        "distances overflow": values * 2e18,
        "squares vanish": values * 1e-30,
    }[name]


SPOILT = ["different", "equal", "zero", "two kinds", "all NaN", "some NaN", "some infinite", "squares overflow"]


@pytest.mark.parametrize("name", [*SPOILT, "distances overflow", "squares vanish"])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, MAX_ORDERED - 1, MAX_ORDERED, MAX_ORDERED + 1, 300])
def test_whatever_an_entry_holds_no_token_comes_twice(name: str, num_tokens: int) -> None:
    order = order_of(entry_of(spoilt(name, num_tokens)), CPU)
    assert (order.shape, order.dtype) == ((min(num_tokens, MAX_ORDERED),), torch.int32)
    assert len(set(order.tolist())) == len(order)
    assert 0 <= order.min() <= order.max() < num_tokens


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_number_that_is_none_takes_its_feature_out_of_the_comparison_and_no_more(value: float) -> None:
    entry = randn(3, 2, 60, 2, 8)
    entry[1, 1, 20, 0, 3] = value
    without = entry.clone()
    without[1, 1, :, 0, 3] = 0
    assert torch.equal(order_of(entry, CPU), order_of(without, CPU))


# -- weights ----------------------------------------------------------------------------------------------------------


def sampled(num_tokens: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))[:num_samples]


def exact(rows: torch.Tensor, samples: torch.Tensor, penalty: float = ridge.PENALTY) -> torch.Tensor:
    """Weights [tokens, samples]: what the fit makes of a change of one sample alone."""
    return ridge.fitted(rows, samples, torch.eye(len(samples)), penalty)


def bound(rows: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """How far each weight may be off, [tokens, samples]. Sums in fp32 of as many terms as there are features, a
    system whose condition number is known, and one rounding to the dtype of `rows`.
    """
    fp32, half = torch.finfo(torch.float32).eps, torch.finfo(rows.dtype).eps / 2
    rows = rows.double()
    known = rows[samples] - rows[samples].mean(0)
    centred = rows - rows[samples].mean(0)
    products = known @ known.T
    penalty = ridge.PENALTY * products.diagonal().mean()
    slopes = torch.linalg.solve(products + penalty * torch.eye(len(samples)), known).T
    sums = rows.shape[1] * (rows.abs() + rows[samples].abs().mean(0)) @ slopes.abs()
    solving = ridge.condition(len(samples)) * centred.norm(dim=1, keepdim=True) * slopes.norm(dim=0)
    off = fp32 * (sums + solving)
    # The weights of a token are moved so that they sum to one: by their mean error.
    return off + off.mean(1, keepdim=True) + half * exact(rows, samples).abs()


@pytest.mark.parametrize("offset", [0.0, 1.0, 8.0])
@pytest.mark.parametrize(("num_samples", "width"), [(2, 6), (8, 3), (8, 100), (40, 30), (128, 200)])
@every_dtype
def test_weights_are_those_of_least_squares_with_a_penalty(
    num_samples: int, width: int, offset: float, dtype: torch.dtype
) -> None:
    rows, samples = (randn(150, width, seed=width) + offset).to(dtype), sampled(150, num_samples)
    found = weights(rows, samples)
    assert (found.shape, found.dtype) == ((150, num_samples), dtype)
    assert bool(((found.double() - exact(rows, samples)).abs() <= bound(rows, samples)).all())


@every_dtype
def test_the_bound_is_small_enough_to_see_another_penalty(dtype: torch.dtype) -> None:
    rows, samples = randn(150, 100).to(dtype), sampled(150, 40)
    off = (weights(rows, samples).double() - exact(rows, samples, 2 * ridge.PENALTY)).abs()
    assert bool((off > bound(rows, samples)).any())


@pytest.mark.parametrize("num_samples", [1, 3, 8, 128])
@every_dtype
def test_weights_of_a_token_sum_to_one(num_samples: int, dtype: torch.dtype) -> None:
    """Each is rounded to the dtype by itself, and nothing else is."""
    rows, samples = (3 * randn(150, 64) + 2).to(dtype), sampled(150, num_samples)
    found = weights(rows, samples).double()
    rounding = torch.finfo(dtype).eps / 2 + num_samples * torch.finfo(torch.float32).eps
    # In fp32, before that, a constant is added that is only as exact as the largest weights are.
    assert bool(((found.sum(1) - 1).abs() <= rounding * (found.abs().sum(1) + 1)).all())


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_samples_that_hold_the_same_count_alike_for_all_tokens(num_samples: int, scale: float) -> None:
    """Also for tokens that hold something else: nothing says which sample those would follow."""
    rows = scale * randn(120, 50)
    rows[:num_samples] = rows[0].clone()
    found = weights(rows, torch.arange(num_samples))
    assert (found - 1 / num_samples).abs().max() <= num_samples * torch.finfo(torch.float32).eps


@every_dtype
def test_where_all_tokens_hold_the_same_or_nothing_the_fit_is_the_mean(dtype: torch.dtype) -> None:
    samples = sampled(30, 7)
    for rows in (torch.full((30, 20), 0.3), torch.zeros(30, 20), randn(1, 20).expand(30, -1)):
        found = weights(rows.to(dtype), samples)
        assert (found.double() - 1 / 7).abs().max() <= torch.finfo(dtype).eps


def test_samples_that_hold_the_same_share_what_one_of_them_would_get() -> None:
    rows = randn(40, 30)
    rows[1] = rows[2] = rows[0]
    found = weights(rows, torch.tensor([0, 1, 2, 10, 20]))
    # The two differ by rounding, which the system makes larger.
    apart = (found[:, :3] - found[:, :3].mean(1, keepdim=True)).abs().max()
    assert apart <= ridge.condition(5) * torch.finfo(torch.float32).eps * found.abs().max()


def test_weights_do_not_depend_on_the_scale_of_values() -> None:
    rows, samples = randn(60, 40), sampled(60, 12)
    for scale in (2.0**-30, 2.0**20):
        assert torch.equal(weights(scale * rows, samples), weights(rows, samples))


def test_a_token_like_a_sample_follows_that_one() -> None:
    """Of eight samples that are far apart, a copy of one gets all of its weight but what the penalty takes."""
    rows = torch.cat((torch.eye(8), torch.eye(8))) * 3
    found = weights(rows, torch.arange(8))[8:]
    # All centred samples have the same square, and one direction less than samples: shrunk by s / (s + penalty).
    square = 9 * (1 - 1 / 8)
    kept = 9 / (9 + ridge.PENALTY * square)
    expected = kept * torch.eye(8) + (1 - kept) / 8
    assert (found - expected).abs().max() <= ridge.condition(8) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("is_sample", [True, False])
def test_damage_stays_with_the_token_that_has_it_unless_that_is_a_sample(is_sample: bool) -> None:
    rows, samples = randn(20, 10), torch.tensor([1, 5, 9])
    clean = weights(rows, samples)
    rows[5 if is_sample else 6] = torch.nan
    found = weights(rows, samples)
    damaged = torch.arange(20) == 6
    assert bool(found[damaged].isnan().all())
    assert bool(found.isnan().all()) if is_sample else torch.equal(found[~damaged], clean[~damaged])
