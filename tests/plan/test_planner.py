"""The planner against a naive labelling of every token of random prompts, and the promises of its plans one by one."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import pytest

from vlcache_connector.plan.planner import plan_reuse
from vlcache_connector.policy import POLICIES, Policy
from vlcache_connector.types import Reason, ReusePlan, Run, Span

NUM_CASES = 5000
REUSED, RECOMPUTED = "reused", "recomputed"


class EveryThird(Policy):
    """Scattered tokens, as a policy that goes by scores would choose them."""

    name = "every_third"

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        return tuple(Run(offset, offset + 1) for offset in range(1, length, 3))


def is_sample(offset: int, length: int, ratio: Fraction, order: Sequence[int]) -> bool:
    """Whether `shifted` takes a token: those of the order, then the first of each half, quarter, eighth and so on."""
    parts = (Fraction(2 * i + 1, 2**level) for level in itertools.count(1) for i in reversed_order(level - 1))
    candidates = itertools.chain(order, [0], (math.floor(part * length) for part in parts))
    count = min(length, max(12, math.ceil(ratio * length))) if ratio > 0 else 0
    taken: set[int] = set()
    while len(taken) < count:
        taken.add(next(candidates))
    return offset in taken


def reversed_order(level: int) -> list[int]:
    """0 to 2^level - 1 so that each next one is in the middle of the widest gap: 0, then 0 1, then 0 2 1 3."""
    return [0] if level == 0 else [2 * i + last for last in (0, 1) for i in reversed_order(level - 1)]


SETTLED = {name: policy for name, policy in POLICIES.items() if policy.measure is None}
ALL_POLICIES: dict[str, Policy] = {**SETTLED, "every_third": EveryThird()}
# policy -> whether it recomputes token number `offset` of a span of `length` tokens, in exact arithmetic
IS_CHOSEN: dict[str, Callable[[int, int, Fraction, Sequence[int]], bool]] = {
    "full": lambda offset, length, ratio, order: True,
    "leading": lambda offset, length, ratio, order: offset * ratio.denominator < ratio.numerator * length,
    "none": lambda offset, length, ratio, order: False,
    "shifted": is_sample,
    "every_third": lambda offset, length, ratio, order: offset % 3 == 1,
}


@dataclass(frozen=True)
class Case:
    spans: tuple[Span, ...]
    available: tuple[bool, ...]
    num_tokens: int
    num_local: int
    policy: str
    ratio: str  # decimal text: its exact value is known
    min_reuse_tokens: int
    orders: tuple[Sequence[int], ...] | None

    def plan(self) -> ReusePlan | Reason:
        policy, ratio = ALL_POLICIES[self.policy], float(self.ratio)
        where = self.spans, self.available, self.num_tokens, self.num_local
        return plan_reuse(*where, policy, ratio, self.min_reuse_tokens, orders=self.orders)


def span(offset: int, length: int, name: str = "a") -> Span:
    return Span(offset, length, name.encode() + b" kv", name.encode() + b" embedding")


def random_cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for _ in range(NUM_CASES):
        spans: list[Span] = []
        end = 0
        for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
            start = end + rng.choice([0, 0, 1, 2, 5, 17])
            spans.append(span(start, rng.choice([1, 1, 2, 3, 4, 7, 16, 33]), rng.choice("abcd")))
            end = spans[-1].end
        num_tokens = max(1, end + rng.choice([0, 0, 1, 3, 9]))
        known = {key for key in (b"a kv", b"b kv", b"c kv", b"d kv") if rng.random() < rng.choice([0.2, 0.6, 1.0])}
        by_key = [s.kv_key in known for s in spans]
        available = rng.choice([by_key, by_key, [True] * len(spans), [rng.random() < 0.8 for _ in spans]])
        edges = [s.offset for s in spans] + [s.end for s in spans] + [0, num_tokens - 1]
        yield Case(
            tuple(spans),
            tuple(available),
            num_tokens,
            min(rng.choice([0, 0, rng.choice(edges), rng.randrange(num_tokens)]), num_tokens - 1),
            rng.choice(sorted(ALL_POLICIES)),
            rng.choice(["0", "0.001", "0.05", "0.07", "0.25", "0.5", "0.875", "1"]),
            rng.choice([1, 1, 2, 8, 64]),
            rng.choice([None, *[tuple(random_order(rng, s.length) for s in spans)] * 3]),
        )


def random_order(rng: random.Random, length: int) -> list[int]:
    """All tokens of a span, a few of them, or none."""
    return rng.sample(range(length), rng.choice([length, min(length, rng.randrange(9)), 0]))


def label_naively(case: Case) -> list[str] | Reason:
    """What happens to each token of the covered range, decided token by token."""
    owner: dict[int, int] = {}
    for number, each in enumerate(case.spans):
        owner.update(dict.fromkeys(range(each.offset, each.end), number))
    labels: list[str] = []
    length = covered = 0
    is_blocked = False
    for token in range(case.num_local, case.num_tokens - 1):
        if token not in owner:
            labels.append(RECOMPUTED)
            continue
        item = case.spans[owner[token]]
        if not case.available[owner[token]]:
            is_blocked = True
            break
        order = case.orders[owner[token]] if case.orders is not None else ()
        is_chosen = IS_CHOSEN[case.policy](token - item.offset, item.length, Fraction(case.ratio), order)
        labels.append(RECOMPUTED if is_chosen else REUSED)
        covered += 1
        length = len(labels)
    if covered == 0:
        if is_blocked:
            return Reason.BEHIND_NEW_IMAGE if True in case.available[owner[token] :] else Reason.MISS
        return Reason.IN_PREFIX_CACHE if case.spans else Reason.NO_MEDIA
    return labels[:length] if covered >= case.min_reuse_tokens else Reason.TOO_FEW_TOKENS


def labels_of(plan: ReusePlan) -> list[str]:
    """The plan, token by token. A token of the range that is named twice, or not at all, fails here."""
    reused = [t for part in plan.spans for run in part.reused for t in range(run.start, run.end)]
    recomputed = [t for run in plan.recomputed for t in range(run.start, run.end)]
    assert sorted(reused + recomputed) == list(range(plan.start, plan.end))
    names = {**dict.fromkeys(reused, REUSED), **dict.fromkeys(recomputed, RECOMPUTED)}
    return [names[token] for token in range(plan.start, plan.end)]


def plans(seed: int) -> Iterator[tuple[Case, ReusePlan]]:
    for case in random_cases(seed):
        plan = case.plan()
        if isinstance(plan, ReusePlan):
            yield case, plan


# -- random prompts ---------------------------------------------------------------------------------------------------


def test_this_file_knows_every_policy() -> None:
    assert set(IS_CHOSEN) == set(ALL_POLICIES)


def test_a_plan_is_what_a_naive_labelling_of_every_token_says() -> None:
    for case in random_cases(seed=1):
        plan = case.plan()
        found = labels_of(plan) if isinstance(plan, ReusePlan) else plan
        assert found == label_naively(case), case


def test_random_prompts_reach_every_shape_and_every_answer() -> None:
    """The generator is worth nothing when a shape is missing from it."""
    seen: Counter[str] = Counter()
    for case in random_cases(seed=1):
        answer = case.plan()
        seen[str(answer) if isinstance(answer, Reason) else "plan"] += 1
        if not isinstance(answer, ReusePlan):
            continue
        last = answer.spans[-1].span
        seen["adjacent spans"] += any(a.span.end == b.span.offset for a, b in pairwise(answer.spans))
        seen["span at position 0"] += answer.spans[0].span.offset == 0
        seen["span ends the prompt"] += last.end == case.num_tokens
        seen["local hit inside a span"] += any(s.offset < case.num_local < s.end for s in case.spans)
        seen["local hit beyond a span"] += any(s.end <= case.num_local for s in case.spans)
        seen["repeated key"] += len({part.span.kv_key for part in answer.spans}) < len(answer.spans)
        seen["stopped by a new image"] += not all(
            ok for s, ok in zip(case.spans, case.available, strict=True) if s.offset >= last.offset
        )
        seen["known image behind a new one"] += any(
            ok for s, ok in zip(case.spans, case.available, strict=True) if s.offset > last.offset
        )
        seen["nothing reused"] += answer.first_reused is None
        told = [len(order) for s, order in zip(case.spans, case.orders or (), strict=False) if s.length > 8]
        samples = case.policy == "shifted" and case.ratio not in ("0", "1")
        seen["order followed"] += samples and any(length >= 8 for length in told)
        seen["order too short"] += samples and any(0 < length < 8 for length in told)
    answers = ["plan", Reason.NO_MEDIA, Reason.MISS, Reason.BEHIND_NEW_IMAGE, Reason.IN_PREFIX_CACHE]
    shapes = [name for name in seen if " " in name]
    assert len(shapes) == 11
    assert all(seen[name] >= 20 for name in [*answers, Reason.TOO_FEW_TOKENS, *shapes]), seen


def test_the_range_starts_behind_the_local_hit_and_leaves_the_last_token() -> None:
    for case, plan in plans(seed=2):
        assert plan.start == case.num_local, case
        assert plan.start < plan.end <= case.num_tokens - 1, case


def test_local_tokens_are_left_alone() -> None:
    for case, plan in plans(seed=3):
        runs = [*plan.recomputed, *(run for part in plan.spans for run in (*part.reused, *part.recomputed))]
        assert min(run.start for run in runs) >= case.num_local, case


def test_the_range_ends_with_a_span_and_before_the_first_unavailable_one() -> None:
    for case, plan in plans(seed=4):
        assert plan.end == min(plan.spans[-1].span.end, case.num_tokens - 1), case
        for each, is_available in zip(case.spans, case.available, strict=True):
            if not is_available and each.end > case.num_local:
                assert each.offset >= plan.end, case


def test_every_available_span_up_to_the_end_of_the_range_is_part_of_the_plan() -> None:
    for case, plan in plans(seed=5):
        inside = [s for s in case.spans if s.end > plan.start and s.offset < plan.end]
        assert [part.span for part in plan.spans] == inside, case


def test_runs_are_sorted_maximal_and_not_empty() -> None:
    for case, plan in plans(seed=6):
        for runs in (plan.recomputed, *(part.reused for part in plan.spans)):
            assert all(run.start < run.end for run in runs), case
            assert all(a.end < b.start for a, b in pairwise(runs)), case


def test_each_part_splits_the_covered_tokens_of_its_span() -> None:
    for case, plan in plans(seed=7):
        for part in plan.spans:
            tokens = sorted(t for run in (*part.reused, *part.recomputed) for t in range(run.start, run.end))
            window = range(max(part.span.offset, plan.start), min(part.span.end, plan.end))
            assert tokens == list(window), case


def test_the_numbers_of_a_plan_are_counts_of_its_tokens() -> None:
    for case, plan in plans(seed=8):
        labels = labels_of(plan)
        assert (plan.num_reused, plan.num_recomputed) == (labels.count(REUSED), labels.count(RECOMPUTED)), case
        first = plan.start + labels.index(REUSED) if REUSED in labels else None
        assert plan.first_reused == first, case


# -- one promise at a time --------------------------------------------------------------------------------------------

LEADING = POLICIES["leading"]


def planned(spans: list[Span], num_tokens: int, num_local: int = 0, ratio: float = 0.1) -> ReusePlan:
    plan = plan_reuse(spans, [True] * len(spans), num_tokens, num_local, LEADING, ratio, 1)
    assert isinstance(plan, ReusePlan)
    return plan


def test_text_before_between_and_at_the_edges_of_spans_is_recomputed() -> None:
    plan = planned([span(5, 100), span(108, 50)], 200)
    assert (plan.start, plan.end) == (0, 158)
    assert plan.recomputed == (Run(0, 15), Run(105, 113))
    assert [part.reused for part in plan.spans] == [(Run(15, 105),), (Run(113, 158),)]
    assert [part.recomputed for part in plan.spans] == [(Run(5, 15),), (Run(108, 113),)]


@pytest.mark.parametrize(
    ("num_local", "recomputed", "reused"),
    [
        (5, (Run(5, 15),), (Run(15, 105),)),
        (9, (Run(9, 15),), (Run(15, 105),)),
        (15, (), (Run(15, 105),)),
        (60, (), (Run(60, 105),)),
        (104, (), (Run(104, 105),)),
    ],
)
def test_leading_tokens_count_from_the_start_of_the_span_not_of_the_range(
    num_local: int, recomputed: tuple[Run, ...], reused: tuple[Run, ...]
) -> None:
    plan = planned([span(5, 100)], 200, num_local)
    assert plan.recomputed == plan.spans[0].recomputed == recomputed
    assert plan.spans[0].reused == reused


def test_a_span_that_ends_the_prompt_leaves_its_last_token_to_the_engine() -> None:
    plan = planned([span(5, 100)], 105)
    assert plan.end == 104
    assert plan.spans[0].reused == (Run(15, 104),)


def test_adjacent_spans_are_recomputed_each_from_its_own_start() -> None:
    plan = planned([span(0, 10), span(10, 10), span(20, 10)], 40)
    assert plan.recomputed == (Run(0, 1), Run(10, 11), Run(20, 21))
    assert plan.end == 30


def test_one_image_that_comes_twice_is_two_parts() -> None:
    plan = planned([span(0, 10, "a"), span(20, 10, "a")], 40)
    assert [part.span.offset for part in plan.spans] == [0, 20]


def test_known_images_behind_a_new_one_are_left_to_the_engine() -> None:
    spans = [span(0, 100, "a"), span(110, 100, "b"), span(220, 100, "c")]
    plan = plan_reuse(spans, [True, False, True], 400, 0, LEADING, 0.1, 1)
    assert isinstance(plan, ReusePlan)
    assert (plan.end, len(plan.spans)) == (100, 1)


def test_a_new_image_within_the_local_hit_stops_nothing() -> None:
    plan = plan_reuse([span(0, 100, "a"), span(110, 100, "b")], [False, True], 400, 100, LEADING, 0.1, 1)
    assert isinstance(plan, ReusePlan)
    assert (plan.start, plan.end) == (100, 210)


def test_a_new_image_that_the_local_hit_covers_in_part_stops_the_range() -> None:
    answer = plan_reuse([span(0, 100, "a"), span(110, 100, "b")], [False, True], 400, 99, LEADING, 0.1, 1)
    assert answer is Reason.BEHIND_NEW_IMAGE


def test_a_full_recompute_reuses_nothing_and_still_covers_the_spans() -> None:
    plan = plan_reuse([span(5, 100)], [True], 200, 0, POLICIES["full"], 0.1, 1)
    assert isinstance(plan, ReusePlan)
    assert plan.recomputed == (Run(0, 105),)
    assert (plan.num_reused, plan.first_reused) == (0, None)


def test_each_span_follows_its_own_order() -> None:
    spans = [span(5, 100, "a"), span(105, 20, "b"), span(130, 20, "a")]
    orders = [[99, 3, 50, 51, 52, 10, 80, 0, 60, 61, 62, 63, 1], range(12), [*range(19, 5, -1)]]
    plan = plan_reuse(spans, [True] * 3, 200, 0, POLICIES["shifted"], 0.01, 1, orders=orders)
    assert isinstance(plan, ReusePlan)
    first, second, third = (part.recomputed for part in plan.spans)
    assert first == (Run(5, 6), Run(8, 9), Run(15, 16), Run(55, 58), Run(65, 69), Run(85, 86), Run(104, 105))
    assert second == (Run(105, 117),) and third == (Run(138, 150),)


def test_samples_before_the_range_and_at_its_end_are_left_out() -> None:
    order = [0, 1, 2, 3, 4, 5, 6, 30, 31, 96, 98, 99]
    plan = plan_reuse([span(5, 100)], [True], 105, 36, POLICIES["shifted"], 0.01, 1, orders=[order])
    assert isinstance(plan, ReusePlan)
    assert plan.spans[0].recomputed == (Run(36, 37), Run(101, 102), Run(103, 104)) and plan.end == 104


@pytest.mark.parametrize("limit", [1, 8, 9, 40, 99, 100, 1000])
def test_a_limit_in_tokens_bounds_each_span_by_itself(limit: int) -> None:
    spans = [span(5, 100, "a"), span(110, 30, "b")]
    plan = plan_reuse(spans, [True, True], 200, 0, LEADING, 0.5, 1, limit)
    assert isinstance(plan, ReusePlan)
    recomputed = [sum(map(len, part.recomputed)) for part in plan.spans]
    assert recomputed == [min(50, limit), min(15, limit)]


def test_the_smallest_number_of_covered_span_tokens_counts_no_text_and_no_local_tokens() -> None:
    spans = [span(50, 10), span(70, 10)]
    for num_local, covered in [(0, 20), (55, 15), (60, 10), (75, 5)]:
        assert isinstance(plan_reuse(spans, [True, True], 200, num_local, LEADING, 0.1, covered), ReusePlan)
        assert plan_reuse(spans, [True, True], 200, num_local, LEADING, 0.1, covered + 1) is Reason.TOO_FEW_TOKENS


@pytest.mark.parametrize(
    ("spans", "available", "num_tokens", "num_local", "min_reuse_tokens", "reason"),
    [
        ([], [], 50, 0, 1, Reason.NO_MEDIA),
        ([span(5, 10)], [False], 50, 0, 1, Reason.MISS),
        ([span(5, 10), span(20, 10)], [False, False], 50, 0, 1, Reason.MISS),
        ([span(5, 10), span(20, 10)], [False, True], 50, 0, 1, Reason.BEHIND_NEW_IMAGE),
        ([span(5, 10)], [True], 50, 15, 1, Reason.IN_PREFIX_CACHE),
        ([span(5, 10)], [True], 50, 49, 1, Reason.IN_PREFIX_CACHE),
        ([span(49, 1)], [True], 50, 0, 1, Reason.IN_PREFIX_CACHE),  # nothing of it but the last token
        ([span(0, 1)], [True], 1, 0, 1, Reason.IN_PREFIX_CACHE),
        ([span(5, 10)], [True], 50, 0, 11, Reason.TOO_FEW_TOKENS),
        ([span(5, 10)], [True], 15, 0, 10, Reason.TOO_FEW_TOKENS),  # nine tokens: the last one is the engine's
    ],
)
def test_each_reason_is_given_where_it_applies(
    spans: list[Span], available: list[bool], num_tokens: int, num_local: int, min_reuse_tokens: int, reason: Reason
) -> None:
    assert plan_reuse(spans, available, num_tokens, num_local, LEADING, 0.1, min_reuse_tokens) is reason


def test_availability_is_asked_of_every_span() -> None:
    with pytest.raises(ValueError, match="zip"):
        plan_reuse([span(0, 5), span(5, 5)], [True], 50, 0, LEADING, 0.1, 1)
