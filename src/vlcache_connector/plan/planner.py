"""The planner: from the spans of a prompt and what is known of them to a plan, or to the reason why there is none.

Runs on the scheduler side, in microseconds; a pure function of plain data.
"""

from collections.abc import Sequence

from vlcache_connector.policy import Policy
from vlcache_connector.types import Reason, ReusePlan, Run, Span, SpanPlan


def plan_reuse(
    spans: Sequence[Span],
    available: Sequence[bool],
    num_tokens: int,
    num_local: int,
    policy: Policy,
    ratio: float,
    min_reuse_tokens: int,
    recompute_tokens: int | None = None,
    orders: Sequence[Sequence[int]] | None = None,
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
        share = ratio if recompute_tokens is None else min(ratio, recompute_tokens / span.length)
        parts.append(_plan_span(span, limit, policy.recompute(span.length, share, orders[i] if orders else ())))
    if not parts:
        return stopped_by or (Reason.IN_PREFIX_CACHE if spans else Reason.NO_MEDIA)

    covered = sum(len(run) for part in parts for run in (*part.reused, *part.recomputed))
    if covered < min_reuse_tokens:
        return Reason.TOO_FEW_TOKENS
    end = min(parts[-1].span.end, limit.end)
    return ReusePlan(num_local, end, tuple(parts), _complement(parts, Run(num_local, end)), policy.shifts)


def _plan_span(span: Span, limit: Run, chosen: Sequence[Run]) -> SpanPlan:
    window = span.run.intersect(limit)
    absolute = (Run(span.offset + run.start, span.offset + run.end) for run in chosen)
    recomputed = tuple(run for run in (one.intersect(window) for one in absolute) if len(run))
    return SpanPlan(span, _gaps(recomputed, window), recomputed)


def _complement(parts: Sequence[SpanPlan], window: Run) -> tuple[Run, ...]:
    return _gaps([run for part in parts for run in part.reused], window)


def _gaps(taken: Sequence[Run], window: Run) -> tuple[Run, ...]:
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
