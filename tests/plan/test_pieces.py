"""Pieces of random plans: together they are the plan, none costs more than it may, and every plan ends."""

import random

import pytest

from vlcache_connector.plan.pieces import LOADED_PER_COMPUTED, next_piece
from vlcache_connector.plan.planner import plan_reuse
from vlcache_connector.policy import POLICIES
from vlcache_connector.types import ReusePlan, Run, Span


def random_plan(rng: random.Random, *names: str) -> ReusePlan:
    spans: list[Span] = []
    end = 0
    for number in range(rng.randint(1, 5)):
        offset, length = end + rng.choice([0, 1, rng.randint(2, 300)]), rng.randint(1, 200)
        spans.append(Span(offset, length, bytes([number]), bytes([number])))
        end = offset + length
    policy = POLICIES[rng.choice(names or ["leading", "full", "none"])]
    num_local = rng.choice([0, 0, rng.randint(0, end - 1)])
    plan = plan_reuse(spans, [True] * len(spans), end + rng.randint(0, 9), num_local, policy, rng.random(), 0)
    return plan if isinstance(plan, ReusePlan) else random_plan(rng, *names)


def positions(runs: list[Run]) -> list[int]:
    return [position for run in runs for position in range(run.start, run.end)]


def cost_by_a_loop(plan: ReusePlan, piece: Run) -> float:
    reused = set(positions([run for part in plan.spans for run in part.reused]))
    return sum(1 / LOADED_PER_COMPUTED if position in reused else 1.0 for position in range(piece.start, piece.end))


@pytest.mark.parametrize("seed", range(200))
def test_pieces_cover_a_plan_in_order_and_stay_within_their_budgets(seed: int) -> None:
    rng = random.Random(seed)
    plan = random_plan(rng)
    start = plan.start
    while start < plan.end:
        budget = rng.choice([0.5, 1.0, 7.3, 64.0, 1000.0])
        piece, cost = next_piece(plan, start, budget)
        assert piece.start == start and piece.end > start, "every piece takes the plan further"
        assert cost == pytest.approx(cost_by_a_loop(plan, piece))
        assert cost <= budget or len(piece) == 1
        if piece.end < plan.end:
            one_more = cost_by_a_loop(plan, Run(start, piece.end + 1))
            assert one_more > budget - 1e-9, "nothing that would have fitted was left for later"
        start = piece.end
    assert start == plan.end


def test_a_budget_for_everything_gives_one_piece() -> None:
    for seed in range(50):
        plan = random_plan(random.Random(seed))
        piece, _ = next_piece(plan, plan.start, float("inf"))
        assert piece == Run(plan.start, plan.end)


@pytest.mark.parametrize("seed", range(200))
def test_no_piece_of_a_plan_that_shifts_ends_within_a_span(seed: int) -> None:
    rng = random.Random(seed)
    plan = random_plan(rng, "shifted")
    start = plan.start
    while start < plan.end:
        budget = rng.choice([0.5, 1.0, 7.3, 64.0, 1000.0])
        piece, cost = next_piece(plan, start, budget)
        assert piece.start == start and piece.end > start, "every piece takes the plan further"
        assert cost == pytest.approx(cost_by_a_loop(plan, piece))
        for part in plan.spans:
            is_cut = part.span.offset < piece.end < min(part.span.end, plan.end)
            assert not (part.reused and is_cut)
        holds_one_span = any(Run(piece.start, piece.end).intersect(part.span.run) for part in plan.spans)
        assert cost <= budget or len(piece) == 1 or holds_one_span
        start = piece.end
    assert start == plan.end
