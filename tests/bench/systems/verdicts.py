"""Targets, what was found, and whether they are met. Runs on the results of all parts of `bench_systems`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.interleaved import ratio
from bench.intervals import Interval, median
from bench.systems.cold import BEHIND, COLD
from bench.systems.growth import AGAIN, COPY, HIT, PASS_ATTENTION
from bench.systems.lookups import LOOKUP
from bench.systems.records import PLAIN, Record, Row, Spread, reuse, rows_of

MOST_COLD = 1.03  # cold request over vLLM without a connector
MOST_GROWTH = 1.0  # of a hit over that of the copy
MOST_LOOKUP_US = 50
LEAST_SOONER, FROM_TOKENS = 16, 8000  # plain over hit, for prompts of so many image tokens
LATER = {0.02: 1.15, 0.05: 1.4}  # ratio -> most that a hit may take over an exact one
LATER_FROM_TOKENS = 1600


@dataclass(frozen=True, slots=True)
class Verdict:
    target: str
    limit: str
    found: str
    word: str  # MET, MISSED, or why neither


MET, MISSED, UNDECIDED, UNMEASURED = "met", "missed", "too noisy to say", "not measured"


def _word(is_met: bool) -> str:
    return MET if is_met else MISSED


@dataclass(frozen=True, slots=True)
class Growth:
    """How much dearer things are at `num_tokens` than at the smallest size, in each repeat, in seconds."""

    num_tokens: int
    of: Mapping[str, Sequence[float]]

    def ratio(self, name: str) -> Interval:
        """Over that of the copy."""
        return median([one / copy for one, copy in zip(self.of[name], self.of[COPY], strict=True)])

    def median_s(self, name: str) -> float:
        return statistics.median(self.of[name])


def growths(found: Mapping[str, Any]) -> list[Growth]:
    """Of each size but the smallest."""
    first, *others = found["sizes"]

    def growth(row: Mapping[str, Any], name: str) -> list[float]:
        pairs = zip(row["seconds"][name], first["seconds"][name], strict=True)
        return [large - small for large, small in pairs]

    return [Growth(row["num_tokens"], {name: growth(row, name) for name in first["seconds"]}) for row in others]


def quantile_us(us: Sequence[float], quantile: float) -> float:
    """Microseconds."""
    return sorted(us)[min(int(quantile * len(us)), len(us) - 1)]


def verdicts(content: Mapping[str, Any], ttft: Mapping[str, Any] | None) -> list[Verdict]:
    """`ttft` is the result of `make bench`, which knows what vLLM alone takes for as many tokens as reuse computes."""
    targets = content["targets"]
    return [
        *(_cold(targets["cold"]) if "cold" in targets else ()),
        *(_growth(targets["growth"]) if "growth" in targets else ()),
        *(_lookups(targets["lookups"]) if "lookups" in targets else ()),
        *_sizes(content.get("sizes", {"records": []}), ttft),
    ]


def _cold(found: Mapping[str, Any]) -> Iterator[Verdict]:
    rounds = found["rounds"]
    for what, behind in ((f"{found['num_tokens']} new tokens", ""), ("text right behind them", BEHIND)):
        pairs = [(one[COLD + behind], one[PLAIN + behind]) for one in rounds]
        interval, quartiles = median([cold / plain for cold, plain in pairs]), ratio(*zip(*pairs, strict=True))
        is_unclear = interval.low <= MOST_COLD < interval.high
        word = UNDECIDED if is_unclear else _word(interval.high <= MOST_COLD)
        told = f"{interval.value:.3f}, 95 % {interval.low:.3f}-{interval.high:.3f}"
        told += f", quartiles {quartiles.low:.2f}-{quartiles.high:.2f}, {len(pairs)} pairs"
        yield Verdict(f"{what}: ours over vLLM without a connector", f"<= {MOST_COLD:g}", told, word)


def _growth(found: Mapping[str, Any]) -> Iterator[Verdict]:
    first, *others = found["sizes"]
    for growth, row in zip(growths(found), others, strict=True):
        interval = growth.ratio(HIT)
        told = f"{interval.value:.1f}, 95 % {interval.low:.1f}-{interval.high:.1f}"
        attending = row["parts"][PASS_ATTENTION] - first["parts"][PASS_ATTENTION]
        told += f" (its attention alone {attending / growth.median_s(COPY):.1f},"
        told += f" vLLM's own prefix hit {growth.ratio(AGAIN).value:.1f})"
        sizes = f"{first['num_tokens']} to {growth.num_tokens}"
        what = f"{found['budget_tokens']} tokens recomputed, growth {sizes}: hit over copy"
        yield Verdict(what, f"<= {MOST_GROWTH:g}", told, _word(interval.value <= MOST_GROWTH))


def _lookups(found: Mapping[str, Any]) -> Iterator[Verdict]:
    for is_cold, caches in ((False, "caches warm"), (True, "caches cold")):
        cases = [case for case in found["cases"] if case["is_cold"] == is_cold]
        worst = max(cases, key=lambda case: statistics.median(case["us"][LOOKUP]))
        us = worst["us"][LOOKUP]
        told = f"{statistics.median(us):.0f}, p99 {quantile_us(us, 0.99):.0f} ({worst['case']})"
        what = f"look-up of a request among {found['num_entries']:,} entries, {caches} [us]"
        yield Verdict(what, f"<= {MOST_LOOKUP_US}", told, _word(statistics.median(us) <= MOST_LOOKUP_US))


def _sizes(found: Mapping[str, Any], ttft: Mapping[str, Any] | None) -> Iterator[Verdict]:
    rows = [row for row in rows_of(Record(**record) for record in found["records"]) if row.system == "vlcache"]
    for share in LATER:
        what, limit = f"plain over {reuse(share)}, {FROM_TOKENS} tokens and more", f">= {LEAST_SOONER}"
        large = [row for row in rows if row.variant == reuse(share) and row.num_tokens >= FROM_TOKENS]
        worst = min(large, key=lambda row: row.plain_over.median, default=None)
        if worst is None:
            yield Verdict(what, limit, "-", UNMEASURED)
        else:
            word = _word(worst.plain_over.median >= LEAST_SOONER)
            yield Verdict(what, limit, _at(worst, worst.plain_over), word)
    for share, most in LATER.items():
        what, limit = f"{reuse(share)} over exact hit, {LATER_FROM_TOKENS} tokens and more", f"<= {most:g}"
        concerned = [row for row in rows if row.variant == reuse(share) and row.num_tokens >= LATER_FROM_TOKENS]
        worst = max(concerned, key=lambda row: row.over_exact.median, default=None)
        if worst is None:
            yield Verdict(what, limit, "-", UNMEASURED)
        else:
            told = _at(worst, worst.over_exact) + _floor(ttft, share, worst.num_tokens)
            yield Verdict(what, limit, told, _word(worst.over_exact.median <= most))


def _at(row: Row, found: Spread) -> str:
    return f"{found} at {row.num_tokens}"


def _floor(ttft: Mapping[str, Any] | None, share: float, num_tokens: int) -> str:
    """What vLLM alone takes for as many tokens, at this size, or at the one below it that was measured."""
    name = f"same work {round(100 * share)} % / exact hit"
    cases = [case for case in (ttft or {"cases": []})["cases"] if len(case["case"]["images"]) == 1]
    known = {case["num_image_tokens"]: case["ratios"][name]["median"] for case in cases if name in case["ratios"]}
    at = max((size for size in known if size <= num_tokens), default=None)
    return f" (vLLM alone needs {known[at]:.2f} for as many tokens, at {at})" if at is not None else ""
