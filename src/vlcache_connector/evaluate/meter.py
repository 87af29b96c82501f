"""What it does to answers when layers recompute different shares of a span: measured through the engine."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from vlcache_connector.evaluate.runs import Asker, NoReuseError, named, replies
from vlcache_connector.evaluate.settings import FULL, reuse
from vlcache_connector.evaluate.statistics import divergence
from vlcache_connector.evaluate.tasks import Question
from vlcache_connector.policy.shifted import Shifted

Ratios = tuple[float, ...]
"""For each layer; none is above the one before."""


@dataclass(frozen=True, slots=True)
class Measured:
    """KL of the first token from full recompute, of each question in nats; recomputed tokens of one, on average."""

    kls: tuple[float, ...]
    recomputed_tokens: float

    @property
    def kl(self) -> float:
        return fmean(self.kls)


@dataclass(slots=True)
class _Row:
    """One question, and what is known of it."""

    question: Question
    yardstick: Mapping[int, float] | None = None  # log-probabilities under full recompute
    results: dict[Ratios, tuple[float, int]] = field(default_factory=dict)  # KL, recomputed tokens


class Meter:
    """Asks questions with ratios by layer. A question that is answered without reuse, once, tells nothing and is left
    out of everything: all means are over the same questions.

    Args:
        progress: is told how many questions were asked, each with all that was new to one call of `measure`.
    """

    def __init__(self, asker: Asker, questions: Sequence[Question], progress: Callable[[int], None]) -> None:
        self.left_out: Counter[str] = Counter()  # reason -> questions
        self.smallest_span = 0  # tokens; 0 before anything was measured
        self._asker = asker
        self._progress = progress
        self._num_asked = 0
        self._rows = [_Row(question) for question in questions]

    @property
    def num_questions(self) -> int:
        """Without those that are left out."""
        return len(self._rows)

    def measure(self, candidates: Sequence[Ratios]) -> list[float]:
        """Mean KL of each, in nats. Raises `RefusedError`, and `NoReuseError` when no question is left."""
        new = [each for each in dict.fromkeys(candidates) if each not in self._rows[0].results]
        if new:
            self._rows = [row for row in self._rows if self._ask(row, new)]
        if not self._rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
            raise NoReuseError(f"no question has pictures that are reused ({reasons}), so there is nothing to measure")
        return [self.measured(each).kl for each in candidates]

    def measured(self, candidate: Ratios) -> Measured:
        """What `measure` was asked for before."""
        kls, tokens = zip(*(row.results[candidate] for row in self._rows), strict=True)
        return Measured(kls, fmean(tokens))

    def _ask(self, row: _Row, candidates: Sequence[Ratios]) -> bool:
        """False when the question is to be left out."""
        ways = [reuse(Shifted.name, each) for each in candidates]
        with named(row.question):
            answers = list(replies(self._asker, row.question, ways if row.yardstick else [FULL.options, *ways]))
        self._num_asked += 1
        self._progress(self._num_asked)
        if row.yardstick is None:
            row.yardstick = answers.pop(0).logprobs
        if reasons := [reply.report["reason"] for reply in answers if "reason" in reply.report]:
            self.left_out[reasons[0]] += 1
            return False
        lengths = [span["length"] for span in answers[0].report["plan"]["spans"]]
        self.smallest_span = min(self.smallest_span or lengths[0], *lengths)
        for candidate, reply in zip(candidates, answers, strict=True):
            kl = divergence(row.yardstick, reply.logprobs).kl
            row.results[candidate] = kl, reply.report["recomputed_tokens"]
        return True
