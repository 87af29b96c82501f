"""The planner: from the spans of a prompt and what is known of them to a plan, or to the reason why there is none.

Runs on the scheduler side, in microseconds; a pure function of plain data.
"""

from collections.abc import Iterator, Sequence

from vlcache_connector.policy import Choice, Policy
from vlcache_connector.types import Narrowing, Ratio, Reason, ReusePlan, Run, Span, SpanPlan


def plan_reuse(
    spans: Sequence[Span],
    available: Sequence[bool],
    num_tokens: int,
    num_local: int,
    policy: Policy,
    ratio: Ratio,
    min_reuse_tokens: int,
    recompute_tokens: int | None = None,
    orders: Sequence[Sequence[int]] | None = None,
    num_layers: int = 1,
) -> ReusePlan | Reason:
    """Plan the covered range [num_local, end) of a prompt.

    Args:
        spans: the prompt's spans, sorted by offset, disjoint.
        available: for each span, whether its KV and its embedding are at hand.
        num_tokens: tokens of the request; the engine must compute at least the last one.
        num_local: tokens that the engine's own prefix cache already covers. They are left alone.
        policy, ratio: which tokens of a span are recomputed; offsets count from the start of the span.
        min_reuse_tokens: fewer covered span tokens than this are not worth touching the request.
        recompute_tokens: a span whose share is more than this gets a smaller ratio.
        orders: for each span what the policy is told of its content; by default nothing.
        num_layers: of the model; a ratio for each of them must be as many.

    Returns:
        The plan, whose range ends with the last span before the first unavailable one, or the reason for none.
    """
    limit = Run(num_local, num_tokens - 1)
    parts: list[SpanPlan] = []
    stopped_by: Reason | None = None
    for i, (span, is_available) in enumerate(zip(spans, available, strict=True)):
        if len(span.run.intersect(limit)) == 0:
            continue  # inside the local hit already, or nothing of it left but the last token
        if not is_available:
            stopped_by = Reason.BEHIND_NEW_IMAGE if any(available[i:]) else Reason.MISS
            break
        share = _bounded(ratio, recompute_tokens, span.length)
        choice = policy.choose(span.length, share, num_layers, orders[i] if orders else ())
        parts.append(_plan_span(span, limit, choice, num_layers))
    if not parts:
        return stopped_by or (Reason.IN_PREFIX_CACHE if spans else Reason.NO_MEDIA)

    if sum(len(part.span.run.intersect(limit)) for part in parts) < min_reuse_tokens:
        return Reason.TOO_FEW_TOKENS
    end = min(parts[-1].span.end, limit.end)
    recomputed = _complement(parts, Run(num_local, end))
    return ReusePlan(num_local, end, tuple(parts), recomputed, policy.shifts, policy.measure, num_layers)


def _bounded(ratio: Ratio, most_tokens: int | None, length: int) -> Ratio:
    if most_tokens is None:
        return ratio
    most = most_tokens / length
    return tuple(min(one, most) for one in ratio) if isinstance(ratio, tuple) else min(ratio, most)


def _plan_span(span: Span, limit: Run, choice: Choice, num_layers: int) -> SpanPlan:
    window = span.run.intersect(limit)
    recomputed = _absolute(choice.runs, span, window)
    narrowings = tuple(_narrowings(choice, span, window, recomputed, num_layers))
    return SpanPlan(span, (window,) if narrowings else gaps(recomputed, window), recomputed, narrowings)


def _narrowings(
    choice: Choice, span: Span, window: Run, recomputed: Sequence[Run], num_layers: int
) -> Iterator[Narrowing]:
    """Those that leave anything out of the window."""
    count = sum(map(len, recomputed))
    for one in choice.narrowings:
        runs = _absolute(one.runs, span, window)
        is_settled = one.runs or not one.count
        fewer = sum(map(len, runs)) if is_settled else one.count
        if one.layer < num_layers and fewer < count:
            yield Narrowing(one.layer, fewer, runs)
            count = fewer


def _absolute(runs: Sequence[Run], span: Span, window: Run) -> tuple[Run, ...]:
    moved = [Run(span.offset + run.start, span.offset + run.end) for run in runs]
    if window == span.run:  # mostly: samples are many, and this runs between two steps of the engine
        return tuple(moved)
    return tuple(inside for run in moved if len(inside := run.intersect(window)))


def _complement(parts: Sequence[SpanPlan], window: Run) -> tuple[Run, ...]:
    """What is recomputed, in the first layer at least."""
    kept = (
        gaps(part.recomputed, part.span.run.intersect(window)) if part.narrowings else part.reused for part in parts
    )
    return gaps([run for runs in kept for run in runs], window)


def gaps(taken: Sequence[Run], window: Run) -> tuple[Run, ...]:
    """The maximal runs of `window` that no run of `taken` (sorted, disjoint, inside the window) covers."""
    gaps: list[Run] = []
    start = window.start
    for run in taken:
        if run.start > start:
            gaps.append(Run(start, run.start))
        start = run.end
    if start < window.end:
        gaps.append(Run(start, window.end))
    return tuple(gaps)
