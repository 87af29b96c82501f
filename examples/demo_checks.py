"""What the demo compares for each question, and what must hold. Pure functions of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from demo_requests import Answer, Question, median_answer

from bench.results import gap

# Two answers that each differ from the true one by the noise differ from each other by up to twice as much.
NOISE_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """All answers to one question. The first about a photograph has `stored`, the others `reuse` and `complete`."""

    question: Question
    plain: Answer
    exact: list[Answer]
    stored: Answer | None = None
    reuse: list[Answer] = field(default_factory=list)  # with the default ratio of 5 %
    complete: Answer | None = None  # ratio 1.0
    off: Answer | None = None

    @property
    def exact_s(self) -> float:
        return median_answer(self.exact).ttft_s

    @property
    def reuse_s(self) -> float:
        return median_answer(self.reuse).ttft_s

    def cells(self, noise: float) -> list[str]:
        assert self.reuse and self.complete is not None
        answer = median_answer(self.reuse)
        counts = answer.accounting or {}
        return [
            self.question.title,
            str(len(self.question.photographs)),
            str(answer.num_prompt_tokens),
            *(f"{seconds * 1e3:.0f} ms" for seconds in (self.plain.ttft_s, self.exact_s, self.reuse_s)),
            f"{self.plain.ttft_s / self.reuse_s:.1f}x",
            f"{self.reuse_s / self.exact_s:.2f}",
            *(str(counts.get(f"{kind}_tokens")) for kind in ("reused", "recomputed", "computed")),
            *_agreement(self.plain, answer, noise=0),
            *_agreement(self.plain, self.complete, noise),
        ]

    def stored_cells(self) -> list[str]:
        assert self.stored is not None
        plain_s, stored_s = self.plain.ttft_s, self.stored.ttft_s
        times = [f"{plain_s * 1e3:.0f} ms", f"{stored_s * 1e3:.0f} ms", f"{stored_s / plain_s:.2f}"]
        distance = f"{gap(self.plain.logprobs, self.stored.logprobs):.4f}"
        return [self.question.title, str(self.stored.num_prompt_tokens), *times, distance]

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        distances = {
            name: gap(self.plain.logprobs, answer.logprobs)
            for name, answer in (("stored", self.stored), ("complete", self.complete), ("off", self.off))
            if answer is not None
        }
        if self.reuse:
            distances["reuse"] = gap(self.plain.logprobs, self.reuse[0].logprobs)
        return content | {"logprob_difference_to_plain": distances}


@dataclass(frozen=True, slots=True)
class Check:
    promise: str
    offenders: tuple[str, ...]  # what did not keep it

    @property
    def sentence(self) -> str:
        return self.promise + (f" -- not so: {'; '.join(self.offenders)}" if self.offenders else "")

    @property
    def passed(self) -> bool:
        return not self.offenders

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "sentence": self.sentence}


def noise_of(comparisons: Iterable[Comparison]) -> float:
    """The largest logprob difference of plain vLLM to itself: the same prompt computed, and served as an exact hit."""
    return max(gap(c.plain.logprobs, answer.logprobs) for c in comparisons for answer in c.exact)


def check_all(comparisons: list[Comparison], noise: float, cores: list[list[str]]) -> list[Check]:
    """`cores`: for each server, the cores its workers were bound to."""
    known = [c for c in comparisons if c.reuse]
    limit = NOISE_FACTOR * noise
    within = f"{limit:.4f} ({NOISE_FACTOR:g} x noise)"
    return [
        _check("every request with known photographs reused tokens", known, _reused),
        _check("the vision encoder did not run for them", known, _ran_no_encoder),
        _check("the encoder did run for plain vLLM", comparisons, _plain_ran_encoder),
        _check("reuse answered sooner than plain vLLM", known, lambda c: c.reuse_s < c.plain.ttft_s),
        _check(
            f"with ratio 1.0, log-probabilities agree with plain vLLM within {within}",
            known,
            lambda c: c.complete is not None and gap(c.plain.logprobs, c.complete.logprobs) <= limit,
        ),
        _check(
            "with ratio 1.0, the first token is plain vLLM's, unless its lead over the second is within the noise",
            known,
            lambda c: c.complete is not None and (c.complete.token == c.plain.token or c.plain.lead <= limit),
        ),
        _check(
            f'mode "off" on the server with the flag reuses nothing and agrees with plain vLLM within {within}',
            [c for c in known if c.off is not None],
            lambda c: c.off is not None and _is_plain(c.off) and gap(c.plain.logprobs, c.off.logprobs) <= limit,
        ),
        _check(
            f"photographs seen for the first time are computed exactly: within {within}",
            [c for c in comparisons if c.stored is not None],
            lambda c: c.stored is not None and gap(c.plain.logprobs, c.stored.logprobs) <= limit,
        ),
        Check("both servers' workers ran on the same cores", () if cores[0] == cores[1] else (str(cores),)),
        Check("both servers stopped, and no process of theirs is left", ()),  # otherwise `stop` raised
    ]


def _check(promise: str, comparisons: list[Comparison], holds: Callable[[Comparison], bool]) -> Check:
    offenders = tuple(c.question.title for c in comparisons if not holds(c))
    return Check(promise, offenders if comparisons else ("nothing was measured",))


def _reused(c: Comparison) -> bool:
    return all((answer.accounting or {}).get("reused_tokens", 0) > 0 for answer in c.reuse)


def _ran_no_encoder(c: Comparison) -> bool:
    return all(answer.encoder_runs == 0 for answer in (*c.reuse, *([c.complete] if c.complete else [])))


def _plain_ran_encoder(c: Comparison) -> bool:
    return c.plain.encoder_runs == len(c.question.photographs)


def _is_plain(answer: Answer) -> bool:
    counts = answer.accounting or {}
    return counts.get("mode") == "off" and counts.get("reused_tokens") == 0 and counts.get("tier") is None


def _agreement(plain: Answer, other: Answer, noise: float) -> list[str]:
    is_tie = noise > 0 and plain.lead <= NOISE_FACTOR * noise
    verdict = "same" if plain.token == other.token else "tie" if is_tie else "differs"
    return [verdict, f"{gap(plain.logprobs, other.logprobs):.4f}"]
