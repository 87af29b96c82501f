"""Batches for the language model: scenes as token ids, features and positions, all scenes of a batch laid out alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from grid_model.pictures import TOKENS
from grid_model.scenes import Question, Scene, ask, new_scene
from grid_model.words import ID

IMAGE = ID["<|image_pad|>"]
END = ID["<|im_end|>"]


@dataclass(frozen=True)
class Kind:
    """What the scenes of a batch are like. `dense` of the four tokens of a shown cell exist."""

    tasks: dict[str, float]
    pictures: int = 1
    shown: int = 64
    dense: int = 1
    filler: int = 0
    legend: int = 0
    palette: int = 64
    blind: bool = False  # questions do not see the legend, so pictures must have read it
    shift: int = 0  # positions start somewhere in [0, shift]: as if text had been there

    @property
    def name(self) -> str:
        extras = [f"{self.filler} words"] * (self.filler > 0) + ["legend"] * (self.legend > 0) + ["blind"] * self.blind
        return "+".join([f"{self.pictures}x{self.shown * self.dense}", *extras])


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (batch, prefix)
    content: Tensor  # (batch, image tokens)
    place: Tensor  # (batch, image tokens): row x 16 + column
    at: Tensor  # (3, batch, prefix)
    unseen: Tensor  # (prefix,) bool: what questions do not see
    branches: Tensor  # (batch, questions, length)
    labels: Tensor  # the same shape: the next token where it is part of an answer, else -100
    branch_at: Tensor  # (batch, questions x length)
    tasks: np.ndarray  # (batch, questions) names


def visible_tokens(picture: np.ndarray, dense: int, random: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Contents and places (row x 16 + column) of the tokens that exist, in raster order."""
    row, column = np.nonzero(picture >= 0)
    corner = np.argsort(random.random((len(row), 4)), axis=1)[:, :dense]
    place = (2 * row[:, None] + corner // 2) * TOKENS + 2 * column[:, None] + corner % 2
    place = np.sort(place.ravel())
    return picture[place // TOKENS // 2, place % TOKENS // 2], place


@dataclass(frozen=True)
class Prefix:
    """A scene up to its last picture; `end` is the position behind it."""

    ids: list[int]
    content: np.ndarray  # (image tokens,), as in Batch
    place: np.ndarray
    at: np.ndarray  # (3, tokens)
    end: int


def prefix_of(scene: Scene, dense: int, random: Generator, start: int) -> Prefix:
    """The prefix of a scene whose first token has position `start`; `dense` as in Kind."""
    ids, contents, places, positions, now = list[int](), [], [], [], start

    def text(words: list[str]) -> None:
        nonlocal now
        ids.extend(ID[word] for word in words)
        positions.append(np.tile(now + np.arange(len(words)), (3, 1)))
        now += len(words)

    text(["<|im_start|>", *scene.opening()])
    for index, picture in enumerate(scene.pictures):
        text([*scene.before_picture(index), "<|vision_start|>"])
        content, place = visible_tokens(picture, dense, random)
        contents.append(content)
        places.append(place)
        ids.extend([IMAGE] * len(place))
        positions.append(now + np.stack([0 * place, place // TOKENS, place % TOKENS]))
        now += TOKENS
        text(["<|vision_end|>"])
    return Prefix(ids, np.concatenate(contents), np.concatenate(places), np.concatenate(positions, 1), now)


def branch_of(question: Question, length: int) -> tuple[list[int], list[int]]:
    asked = [ID[w] for w in question.words]
    answer = [ID[w] for w in question.answer]
    ids = asked + answer
    labels = [-100] * (len(asked) - 1) + answer + [END]
    return ids + [END] * (length - len(ids)), labels + [-100] * (length - len(ids))


def new_batch(kind: Kind, size: int, questions: int, random: Generator) -> Batch:
    shift = int(random.integers(kind.shift + 1))
    shape = {"pictures": kind.pictures, "shown": kind.shown, "palette": kind.palette}
    prefixes, asked = [], []
    for _ in range(size):
        scene = new_scene(random, filler=kind.filler, legend=kind.legend, **shape)
        prefixes.append(prefix_of(scene, kind.dense, random, shift))
        asked.append(ask(scene, random, kind.tasks, questions))
    length = max(len(q.words) + len(q.answer) for scene in asked for q in scene)
    branches = np.array([[branch_of(q, length) for q in scene] for scene in asked])  # batch, questions, 2, length
    end, legend_at = prefixes[0].end, 1 + kind.filler
    unseen = torch.zeros(len(prefixes[0].ids), dtype=torch.bool)
    unseen[legend_at : legend_at + 4 * kind.legend] = kind.blind
    return Batch(
        ids=torch.tensor([p.ids for p in prefixes]),
        content=torch.from_numpy(np.stack([p.content for p in prefixes])),
        place=torch.from_numpy(np.stack([p.place for p in prefixes])),
        at=torch.from_numpy(np.stack([p.at for p in prefixes], 1)).float(),
        unseen=unseen,
        branches=torch.from_numpy(branches[:, :, 0].copy()),
        labels=torch.from_numpy(branches[:, :, 1].copy()),
        branch_at=torch.arange(end, end + length).float(),
        tasks=np.array([[q.task for q in scene] for scene in asked]),
    )
