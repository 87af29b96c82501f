"""What becomes of reuse that costs more than it saves, by the prices of the running engine."""

import pytest

from engine.conftest import MakeEngine
from engine.fake_prompts import Ask
from engine.scenes import PROMPT, reused, set_prices, show


@pytest.mark.parametrize("recompute_s", [0.5, 50.0])
@pytest.mark.parametrize("at_any_cost", [False, True])
def test_reuse_that_does_not_pay_is_left_alone_unless_a_request_wants_it_at_any_cost(
    make_engine: MakeEngine, recompute_s: float, at_any_cost: bool
) -> None:
    engine = make_engine()
    show(engine)
    set_prices(engine, compute=1.0, recompute=recompute_s, load=0.1)
    (answer,) = engine.ask(Ask(PROMPT, at_any_cost=at_any_cost))
    is_wanted = recompute_s < 1 or at_any_cost
    assert (reused(answer) > 0) == is_wanted
    assert answer.report.get("reason") == (None if is_wanted else "no_gain")


def test_a_request_that_wants_reuse_at_any_cost_gets_no_more_than_its_mode(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine)
    set_prices(engine, compute=1.0, recompute=50.0, load=0.1)
    (answer,) = engine.ask(Ask(PROMPT, "exact", at_any_cost=True))
    assert reused(answer) == 0 and answer.report["reason"] == "mode"
