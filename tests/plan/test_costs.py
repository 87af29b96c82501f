"""When reuse pays, on prices that this file makes up."""

import pytest

from vlcache_connector.plan.costs import Price, Prices, estimate
from vlcache_connector.types import ReusePlan, Run, Span, SpanPlan


def plan_of(num_text: int, num_reused: int, num_recomputed: int) -> ReusePlan:
    """Text, then one image whose first tokens are recomputed."""
    start, end = num_text + num_recomputed, num_text + num_recomputed + num_reused
    span = Span(num_text, num_reused + num_recomputed, b"kv", b"embedding")
    part = SpanPlan(span, (Run(start, end),), (Run(num_text, start),))
    return ReusePlan(0, end, (part,), (Run(0, start),))


def prices_of(compute: float, recompute: float, load: float, samples: int = 8) -> Prices:
    prices = Prices()
    for _ in range(samples):
        prices.add("compute", 100, 100 * compute)
        prices.add("recompute", 100, 100 * recompute)
        prices.add("load", 100, 100 * load)
    return prices


def test_reuse_costs_its_recomputed_and_its_loaded_tokens_and_saves_all_of_them() -> None:
    found = estimate(plan_of(50, 900, 50), prices_of(2.0, 3.0, 0.1))
    assert found is not None
    assert found.reuse_s == pytest.approx(100 * 3.0 + 900 * 0.1)
    assert found.compute_s == pytest.approx(1000 * 2.0)
    assert found.pays


def test_long_new_text_before_a_small_known_image_does_not_pay_where_passes_are_slower_than_the_engine() -> None:
    prices = prices_of(1.0, 2.0, 0.01)
    small, large = estimate(plan_of(8000, 100, 5), prices), estimate(plan_of(8000, 8000, 400), prices)
    assert small is not None and not small.pays
    assert large is not None and large.pays


def test_full_recomputation_is_never_declined() -> None:
    assert estimate(plan_of(100, 0, 100), prices_of(1.0, 9.0, 1.0)) is None


@pytest.mark.parametrize("kind", ["compute", "recompute", "load"])
def test_reuse_is_tried_while_a_price_is_unknown(kind: str) -> None:
    prices = prices_of(1.0, 100.0, 100.0)
    assert estimate(plan_of(10, 10, 10), prices) is not None
    setattr(prices, kind, Price())
    assert estimate(plan_of(10, 10, 10), prices) is None


def test_a_price_is_the_median_of_the_latest_measurements() -> None:
    price = Price()
    for seconds in [1.0] * 3:
        price.add(1, seconds)
    assert price.per_token_s is None, "three measurements may all be of a cold start"
    price.add(1, 1000.0)
    assert price.per_token_s == 1.0, "one odd measurement does not matter"
    for _ in range(100):
        price.add(10, 20.0)
    assert price.per_token_s == 2.0, "old measurements are forgotten"


def test_a_hit_saves_the_computation_of_kv_and_the_encoding_of_embeddings() -> None:
    prices = prices_of(2.0, 100.0, 100.0)
    assert prices.saved_by("kv", 10) == 20.0
    assert prices.saved_by("embedding", 10) is None, "nothing was encoded yet"
    for _ in range(8):
        prices.add("encode", 10, 5.0)
    assert prices.saved_by("embedding", 10) == 5.0
