"""Plans in which deeper layers recompute less: token by token and layer by layer, and their pieces."""

import itertools
import random
from collections.abc import Iterator

import pytest

from vlcache_connector.plan.pieces import next_piece
from vlcache_connector.plan.planner import plan_reuse
from vlcache_connector.policy import POLICIES
from vlcache_connector.types import Measure, ReusePlan, Run, Span

NUM_LAYERS = 5


def random_plans(seed: int, *names: str) -> Iterator[tuple[ReusePlan, tuple[float, ...] | float]]:
    rng = random.Random(seed)
    for _ in range(300):
        spans: list[Span] = []
        end = 0
        for number in range(rng.randint(1, 4)):
            offset, length = end + rng.choice([0, 1, 9]), rng.choice([1, 5, 40, 130])
            spans.append(Span(offset, length, bytes([number]), bytes([number])))
            end = offset + length
        name = rng.choice(names)
        ratios = tuple(sorted((rng.choice([0.0, 0.1, rng.random()]) for _ in range(NUM_LAYERS)), reverse=True))
        ratio = rng.choice([0.05, 0.5]) if POLICIES[name].measure else ratios
        orders = [rng.sample(range(span.length), min(span.length, 20)) for span in spans]
        num_local = rng.choice([0, 0, rng.randrange(end)])
        where = spans, [True] * len(spans), end + rng.randint(0, 5), num_local
        plan = plan_reuse(*where, POLICIES[name], ratio, 1, orders=orders, num_layers=NUM_LAYERS)
        if isinstance(plan, ReusePlan):
            yield plan, ratio


def tokens(runs: tuple[Run, ...]) -> set[int]:
    return {t for run in runs for t in range(run.start, run.end)}


def test_recomputed_tokens_of_each_layer_are_counted_one_by_one() -> None:
    """A token counts in proportion to the layers that recompute it."""
    for plan, _ in random_plans(1, "leading", "shifted"):
        total = 0
        for layer in range(NUM_LAYERS):
            here = tokens(plan.recomputed)
            for part in plan.spans:
                narrowed = [one for one in part.narrowings if one.layer <= layer]
                if narrowed:
                    here -= tokens(part.recomputed) - tokens(narrowed[-1].runs)
                    assert narrowed[-1].count == len(tokens(narrowed[-1].runs))
            total += len(here)
        assert plan.num_recomputed == round(total / NUM_LAYERS)
        assert plan.num_reused + plan.num_recomputed == plan.end - plan.start


def test_what_some_layer_reuses_is_reused_and_the_first_layer_recomputes_the_rest() -> None:
    for plan, _ in random_plans(2, "leading", "shifted", "deviation", "scored"):
        for part in plan.spans:
            window = tokens((part.span.run.intersect(Run(plan.start, plan.end)),))
            assert tokens(part.reused) == (window if part.narrowings else window - tokens(part.recomputed))
            assert tokens(part.recomputed) == tokens(plan.recomputed) & window
        inside = set().union(*(tokens((part.span.run,)) for part in plan.spans))
        text = set(range(plan.start, plan.end)) - inside
        assert text <= tokens(plan.recomputed)


def test_layers_only_leave_tokens_out() -> None:
    for plan, _ in random_plans(3, "leading", "shifted"):
        for part in plan.spans:
            sets = [tokens(part.recomputed), *(tokens(one.runs) for one in part.narrowings)]
            assert all(deeper < before for before, deeper in itertools.pairwise(sets))
            layers = [one.layer for one in part.narrowings]
            assert layers == sorted(set(layers)) and all(0 < layer < NUM_LAYERS for layer in layers)


@pytest.mark.parametrize(("policy", "layer"), [("deviation", 2), ("scored", 0)])
def test_what_a_measure_chooses_is_a_number_of_the_tokens_at_hand(policy: str, layer: int) -> None:
    for plan, _ in random_plans(4, policy):
        assert plan.measure is POLICIES[policy].measure
        for part in plan.spans:
            window = part.span.run.intersect(Run(plan.start, plan.end))
            assert part.recomputed == (window,)
            for one in part.narrowings:
                assert one.layer == layer and one.runs == () and 0 < one.count <= len(window)


def test_a_measure_that_would_choose_in_a_layer_that_is_not_there_chooses_nothing() -> None:
    span = Span(0, 100, b"a", b"b")
    plan = plan_reuse([span], [True], 101, 0, POLICIES["deviation"], 0.1, 1, num_layers=2)
    assert isinstance(plan, ReusePlan)
    assert plan.spans[0].narrowings == () and plan.num_recomputed == 100 and plan.first_reused is None


def test_a_limit_of_tokens_bounds_every_layer() -> None:
    span = Span(0, 100, b"a", b"b")
    ratios = (0.5, 0.2, 0.05)
    plan = plan_reuse([span], [True], 101, 0, POLICIES["leading"], ratios, 1, recompute_tokens=10, num_layers=3)
    assert isinstance(plan, ReusePlan)
    assert plan.spans[0].recomputed == (Run(0, 10),)
    assert [(one.layer, one.runs) for one in plan.spans[0].narrowings] == [(2, (Run(0, 5),))]


@pytest.mark.parametrize("policy", ["leading", "shifted", "deviation", "scored"])
def test_no_piece_ends_within_a_span_that_is_narrowed(policy: str) -> None:
    for seed, (plan, _) in enumerate(random_plans(5, policy)):
        rng, start = random.Random(seed), plan.start
        while start < plan.end:
            piece, cost = next_piece(plan, start, rng.choice([0.5, 7.3, 64.0, 1000.0]))
            assert piece.start == start and piece.end > start
            recomputed = len(tokens(plan.recomputed) & tokens((piece,)))
            assert cost == pytest.approx(recomputed + (len(piece) - recomputed) / 16)
            for part in plan.spans:
                assert not (part.narrowings and part.span.offset < piece.end < min(part.span.end, plan.end))
            start = piece.end
        assert start == plan.end


def test_a_plan_that_goes_by_the_question_is_one_piece() -> None:
    """The question looks at everything before anything is recomputed."""
    for plan, _ in random_plans(6, "scored"):
        assert plan.measure is Measure.ATTENTION
        if any(part.narrowings for part in plan.spans):
            assert next_piece(plan, plan.start, 0.5)[0] == Run(plan.start, plan.end)
