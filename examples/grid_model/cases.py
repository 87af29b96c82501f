"""Prompts that studies of reuse measure: scenes with questions, exact KV, and the entries of their pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from grid_model.reuse import Answers, GridModel, Prompt, answer, entries_alone, exact, prompt_of
from grid_model.scenes import Question, Scene, ask, new_scene

KINDS: dict[str, tuple[dict[str, int], dict[str, float]]] = {
    "50 words before": ({"filler": 50}, {"at": 1.0, "where": 1.0}),
    "500 words before": ({"filler": 500}, {"at": 1.0, "where": 1.0}),
    "legend": ({"legend": 4}, {"at": 1.0}),
    "two pictures": ({"pictures": 2}, {"at": 1.0, "where": 1.0, "which": 1.0}),
    "four pictures": ({"pictures": 4}, {"at": 1.0, "where": 1.0, "which": 1.0}),
    "hop": ({"pictures": 2}, {"hop": 1.0}),
    "legend, two pictures": ({"pictures": 2, "legend": 4}, {"at": 1.0}),
}
"""Of scenes and their questions. One picture with nothing before it is not among them: its entry is exact."""

HELD_OUT = 2**35  # seeds from here on; training and the other scripts draw elsewhere


@dataclass(frozen=True)
class Case:
    scene: Scene
    questions: list[Question]
    prompt: Prompt
    exact: Tensor  # [layers, 2, tokens, heads, dim], keys before rotation
    entries: list[Tensor]  # of each picture, computed alone: [layers, 2, SPAN, heads, dim]
    expected: Answers  # over the exact KV


def cases(model: GridModel, kind: str, scenes: int, questions: int) -> Iterator[Case]:
    shape, tasks = KINDS[kind]
    for number in range(scenes):
        random = np.random.default_rng([HELD_OUT, list(KINDS).index(kind), number])
        scene = new_scene(random, **shape)
        asked, prompt = ask(scene, random, tasks, questions), prompt_of(model, scene)
        kv = exact(model, prompt)
        yield Case(scene, asked, prompt, kv, entries_alone(model, scene), answer(model, prompt, kv, asked))
