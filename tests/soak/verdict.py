"""Judges answers: against plain vLLM where they must be exact, else against the auditors' replay.

The yardstick is the engine's own noise, measured before the traffic: how far log-probabilities move when plain requests
are computed alone, from the prefix cache, or beside others. Two results may each be off by that much; one spacing of a
float32 log-probability of size 8 to 16 comes on top.
"""

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soak.client import Answer
from soak.traffic import PLAIN_KINDS

RESOLUTION = 2.0**-20
_NAME = re.compile(r"soak-\d{6}")


@dataclass(frozen=True)
class Comparison:
    gap: float  # largest difference of a log-probability that both name
    problem: str | None


def compare(
    tokens: Sequence[str],
    tops: Sequence[Mapping[str, float]],
    expected_tokens: Sequence[str],
    expected_tops: Sequence[Mapping[str, float]],
    bound: float,
) -> Comparison:
    """Position by position, up to the first token that differs: that must be one of two that are nearly as likely."""
    largest = 0.0
    for token, top, expected, expected_top in zip(tokens, tops, expected_tokens, expected_tops, strict=False):
        common = top.keys() & expected_top.keys()
        if len(common) < max(1, len(expected_top) // 4):
            return Comparison(float("inf"), "hardly a likely token in common")
        largest = max(largest, *(abs(top[t] - expected_top[t]) for t in common))
        if largest > bound:
            return Comparison(largest, f"log-probabilities are {largest:.2e} apart, the bound is {bound:.2e}")
        if token != expected:
            margin = expected_top[expected] - expected_top.get(token, float("-inf"))
            return Comparison(largest, f"another token, {margin:.2e} less likely" if margin > bound else None)
    return Comparison(largest, None)


def gap_of(one: Answer, other: Answer) -> float:
    """Of two answers to the same plain request."""
    return compare(one.tokens, one.tops, other.tokens, other.tops, float("inf")).gap


@dataclass
class Judge:
    """Takes answers as they come; what needs the auditors' journal is kept until the end."""

    references: Sequence[Answer]
    noise: float
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    largest_gap: dict[str, float] = field(default_factory=dict)
    _waiting: dict[str, Answer] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        return 2 * self.noise + RESOLUTION

    def take(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self.counts[f"kind {answer.call.kind}"] += 1
            report = answer.report or {}
            if answer.report is not None:
                self.reasons[report.get("reason", "reused")] += 1
            if answer.has_given_up:
                self.counts["given up"] += 1
            elif answer.error is not None:
                self.failed.append(f"{answer.call.name}: {answer.error}")
            elif len(answer.tokens) != answer.call.max_tokens:
                self.failed.append(f"{answer.call.name}: {len(answer.tokens)} of {answer.call.max_tokens} tokens")
            elif self._must_be_plain(answer):
                self._compare_with_plain(answer)
            else:
                self._waiting[answer.call.name] = answer

    def finish(self, foretold: Mapping[str, dict[str, Any]], plain: Container[str]) -> None:
        """`foretold`: by the name of the call, the auditors' last word on its first token; `plain`: names of the calls
        that nothing approximate went into.
        """
        for name, answer in self._waiting.items():
            if name in plain:
                self._compare_with_plain(answer)
                continue
            if name not in foretold:
                how = "streamed" if answer.report is None else str(answer.report.get("reason", "image behind"))
                self.counts["not compared"] += 1
                self.counts[f"not compared: {how}"] += 1
                continue
            expected = {f"token_id:{token}": logprob for token, logprob in foretold[name]["top"]}
            first = next(iter(expected))
            found = compare(answer.tokens[:1], answer.tops[:1], [first], [expected], self.bound)
            self._note(answer, found, foretold[name]["how"])
        self._waiting.clear()

    def _must_be_plain(self, answer: Answer) -> bool:
        if answer.call.kind in PLAIN_KINDS:
            return True
        return answer.report is not None and not answer.report["approximate"]

    def _compare_with_plain(self, answer: Answer) -> None:
        reference = self.references[answer.call.scene]
        found = compare(answer.tokens, answer.tops, reference.tokens, reference.tops, self.bound)
        self._note(answer, found, "plain")

    def _note(self, answer: Answer, found: Comparison, against: str) -> None:
        self.counts[f"compared: {against}"] += 1
        self.largest_gap[against] = max(self.largest_gap.get(against, 0.0), found.gap)
        if found.problem is not None:
            call = answer.call
            self.wrong.append(
                f"{call.name} ({call.kind}, scene {call.scene}, tenant {call.salt}) against {against}: "
                f"{found.problem}; {answer.report}"
            )


def foretold_by_name(events: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last word on each request, unless the engine took its blocks away afterwards."""
    latest: dict[str, dict[str, Any]] = {}
    for event in sorted(events, key=lambda e: e["at_s"]):
        if event["kind"] not in ("foretold", "asked_again"):
            continue
        name = _NAME.search(event["request"])
        if name is not None:
            latest[name[0]] = event
    return {name: event for name, event in latest.items() if event["kind"] == "foretold"}


def plain_names(events: Sequence[dict[str, Any]]) -> set[str]:
    """Calls whose requests ended without anything approximate."""
    ended = ((event, _NAME.search(event["request"])) for event in events if event["kind"] == "finished")
    return {name[0] for event, name in ended if name is not None and not event["approximate"]}


_PREFIX = re.compile(r"^(\(.*?pid=\d+\) )?((ERROR|WARNING|INFO|CRITICAL) [\d-]+ [\d:]+ \[.*?\] )?")
_RAISED = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit|Warning)\b")


def unplanned_errors(log: str) -> list[str]:
    """Last lines of the tracebacks in a server's log that no planted fault explains."""
    lines = (_PREFIX.sub("", line, count=1) for line in log.splitlines())
    return [line for line in lines if _RAISED.match(line) and "PlantedError" not in line]
