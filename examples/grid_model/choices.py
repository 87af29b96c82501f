"""Ways to choose what is recomputed, and what to make of it: those of the connector, and others that were tried.

A choice is given a case, the share of image tokens to recompute and the question, and returns runs for each picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from grid_model.batches import branch_of
from grid_model.cases import Case
from grid_model.reuse import SPAN, Answers, Follow, GridModel, Prompt, answer, ask, reuse, stay
from grid_model.scenes import Question
from vlcache_connector.exec.content import features, order_of, weights
from vlcache_connector.policy import POLICIES
from vlcache_connector.types import Run

CPU = torch.device("cpu")
PARTS = 8
Choose = Callable[[GridModel, Case, float, Question], list[Sequence[Run]]]


@dataclass(frozen=True)
class Method:
    choose: Choose
    follow: Follow = stay
    by_question: bool = False  # each question has a pass of its own; else the first one's serves all

    def answers(self, model: GridModel, case: Case, ratio: float) -> Answers:
        if not self.by_question:
            return self._answers(model, case, ratio, case.questions)
        parts = [self._answers(model, case, ratio, [question]) for question in case.questions]
        numbers = [part.question + number for number, part in enumerate(parts)]
        return Answers(torch.cat([p.right for p in parts]), torch.cat([p.logits for p in parts]), torch.cat(numbers))

    def _answers(self, model: GridModel, case: Case, ratio: float, questions: Sequence[Question]) -> Answers:
        runs = self.choose(model, case, ratio, questions[0])
        return answer(model, case.prompt, reuse(model, case.prompt, case.entries, runs, self.follow), questions)


def mean(entry: Tensor, samples: Tensor) -> Tensor:
    """All tokens move by the samples' mean change."""
    return torch.full((SPAN, len(samples)), 1 / len(samples))


def nearest(entry: Tensor, samples: Tensor) -> Tensor:
    """Each token moves as the sample whose stored values are nearest to its own."""
    rows = features(entry, CPU)
    return functional.one_hot(torch.cdist(rows, rows[samples]).argmin(1), len(samples)).float()


def fit(entry: Tensor, samples: Tensor) -> Tensor:
    """Each token moves as a fit of the samples' changes to their stored values says: what the connector does."""
    return weights(features(entry, CPU), samples)


def policy(name: str) -> Choose:
    """The tokens that a policy of the connector recomputes."""
    return lambda model, case, ratio, question: [
        POLICIES[name].recompute(SPAN, ratio, order_of(entry, CPU).tolist()) for entry in case.entries
    ]


def strided(model: GridModel, case: Case, ratio: float, question: Question) -> list[Sequence[Run]]:
    """Single tokens at equal distances."""
    number = math.ceil(ratio * SPAN - 1e-9)
    runs = [Run(at, at + 1) for at in (int((i + 0.5) * SPAN / number) for i in range(number))]
    return [runs] * len(case.entries)


def leading_parts(model: GridModel, case: Case, ratio: float, question: Question) -> list[Sequence[Run]]:
    """The leading tokens of equal parts, one of each at least."""
    each, left = divmod(max(PARTS, math.ceil(ratio * SPAN - 1e-9)), PARTS)
    starts = [part * SPAN // PARTS for part in range(PARTS)]
    runs = [Run(start, start + each + (part < left)) for part, start in enumerate(starts)]
    return [runs] * len(case.entries)


def deviating(model: GridModel, case: Case, ratio: float, question: Question) -> list[Sequence[Run]]:
    """Tokens whose keys deviate most in the second layer, the first in which any do (CacheBlend, arXiv:2405.16444)."""
    keys = torch.stack([case.exact[1, 0, span] for span in case.prompt.spans])
    stored = torch.stack([entry[1, 0] for entry in case.entries])
    return largest((keys - stored).flatten(2).norm(dim=-1), ratio)


def looked_at(model: GridModel, case: Case, ratio: float, question: Question) -> list[Sequence[Run]]:
    """Tokens at which the question looks most when all are reused (as CONDUIT)."""
    kv = reuse(model, case.prompt, case.entries, [()] * len(case.entries))
    return largest(attention(model, case.prompt, kv, question)[case.prompt.spans], ratio)


def largest(scores: Tensor, ratio: float) -> list[Sequence[Run]]:
    """The best of all pictures' tokens together; `scores` is [pictures, SPAN]."""
    best = scores.flatten().topk(math.ceil(ratio * scores.numel() - 1e-9)).indices.sort().values.tolist()
    return [[Run(i % SPAN, i % SPAN + 1) for i in best if i // SPAN == picture] for picture in range(len(scores))]


@torch.no_grad()
def attention(model: GridModel, prompt: Prompt, kv: Tensor, question: Question) -> Tensor:
    """How much the words of a question look at each token of the prompt; see `reuse.ask`. [tokens]."""
    number = len(question.words)
    ids = torch.tensor([branch_of(question, number + len(question.answer))[0][:number]])
    return ask(model, prompt, kv, ids)[1]


METHODS: dict[str, Method] = {
    "none": Method(policy("none")),
    "leading": Method(policy("leading")),
    "strided": Method(strided),
    "deviation": Method(deviating),
    "scored": Method(looked_at, by_question=True),
    "leading + mean": Method(policy("leading"), mean),
    "strided + mean": Method(strided, mean),
    "parts + mean": Method(leading_parts, mean),
    "scored + mean": Method(looked_at, mean, by_question=True),
    "farthest + mean": Method(policy("shifted"), mean),
    "leading + fit": Method(policy("leading"), fit),
    "strided + fit": Method(strided, fit),
    "parts + fit": Method(leading_parts, fit),
    "scored + fit": Method(looked_at, fit, by_question=True),
    "scored once + fit": Method(looked_at, fit),
    "farthest + nearest": Method(policy("shifted"), nearest),
    "shifted": Method(policy("shifted"), fit),
}
