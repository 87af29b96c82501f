"""Ways to choose what is recomputed, and what to make of it: those of the connector, and others that were tried.

A choice is given a case, the share of image tokens to recompute and the question, and returns runs for each picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grid_model.batches import branch_of
from grid_model.cases import Case
from grid_model.reuse import SPAN, Answers, GridModel, Mean, Prompt, answer, ask, reuse, tokens_of
from grid_model.scenes import Question
from vlcache_connector.policy import POLICIES
from vlcache_connector.types import Run

Choose = Callable[[GridModel, Case, float, Question], list[Sequence[Run]]]


@dataclass(frozen=True)
class Method:
    choose: Choose
    mean: Mean | None = None
    by_question: bool = False  # the choice depends on the question, so each question has a pass of its own

    def answers(self, model: GridModel, case: Case, entries: Sequence[Tensor], ratio: float) -> Answers:
        if not self.by_question:
            return self._answers(model, case, entries, ratio, case.questions)
        parts = [self._answers(model, case, entries, ratio, [question]) for question in case.questions]
        numbers = [part.question + number for number, part in enumerate(parts)]
        return Answers(torch.cat([p.right for p in parts]), torch.cat([p.logits for p in parts]), torch.cat(numbers))

    def _answers(
        self, model: GridModel, case: Case, entries: Sequence[Tensor], ratio: float, questions: Sequence[Question]
    ) -> Answers:
        runs = self.choose(model, case, ratio, questions[0])
        return answer(model, case.prompt, reuse(model, case.prompt, entries, runs, self.mean), questions)


def mean_of_runs(change: Tensor, runs: Sequence[Run]) -> Tensor:
    """The mean of the runs' means: [2, heads, dim] of changes [2, samples, heads, dim]."""
    return _means(change, runs).mean(0)


def shrunk_mean(change: Tensor, runs: Sequence[Run]) -> Tensor:
    """The same as far as the runs agree about it, by head: see `exec/shift.py`."""
    means = _means(change, runs)
    mean = means.mean(0)
    if len(runs) == 1:
        return mean
    noise, size = means.var(0).sum(-1, keepdim=True) / len(runs), mean.square().sum(-1, keepdim=True)
    return mean * (1 - noise / size.clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(0)


def _means(change: Tensor, runs: Sequence[Run]) -> Tensor:
    """[runs, 2, heads, dim]."""
    return torch.stack([part.mean(1) for part in change.split([len(run) for run in runs], 1)])


def policy(name: str) -> Choose:
    """The tokens that a policy of the connector recomputes."""
    return lambda model, case, ratio, question: [POLICIES[name].recompute(SPAN, ratio)] * len(case.entries)


def strided(model: GridModel, case: Case, ratio: float, question: Question) -> list[Sequence[Run]]:
    """Single tokens at equal distances."""
    number = math.ceil(ratio * SPAN - 1e-9)
    runs = [Run(at, at + 1) for at in (int((i + 0.5) * SPAN / number) for i in range(number))]
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


def looked_at_and_spread(model: GridModel, case: Case, ratio: float, question: Question) -> list[Sequence[Run]]:
    """Half of the share at which the question looks most, and the samples of `shifted` at the other half."""
    spread = [tokens_of(runs) for runs in policy("shifted")(model, case, ratio / 2, question)]
    found = [tokens_of(runs) for runs in looked_at(model, case, ratio / 2, question)]
    both = [torch.cat(parts).unique().tolist() for parts in zip(spread, found, strict=True)]
    return [[Run(token, token + 1) for token in tokens] for tokens in both]


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
    "scored + mean": Method(looked_at, mean_of_runs, by_question=True),
    "scored, parts + mean": Method(looked_at_and_spread, mean_of_runs, by_question=True),
    "leading + mean": Method(policy("leading"), mean_of_runs),
    "strided + mean": Method(strided, mean_of_runs),
    "strided + shrunk mean": Method(strided, shrunk_mean),
    "parts + mean": Method(policy("shifted"), mean_of_runs),
    "shifted": Method(policy("shifted"), shrunk_mean),
}
