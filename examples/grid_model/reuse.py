"""The grid model with its KV in hand: prompts computed exactly, or over the KV of pictures that were seen elsewhere.

Plain PyTorch in float32, one prompt at a time, for studies that an engine would only slow down. A pass does what the
connector's does (`exec/recompute.py`, `exec/shift.py`): text and chosen tokens go through the layers together, over
stored KV of the other tokens, which may follow the change of the chosen ones. Keys are kept as they are before
rotation, where a position does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from grid_model.batches import END, IMAGE, branch_of, prefix_of
from grid_model.encoder import feature_table
from grid_model.export import named_weights
from grid_model.model import Encoder, Language, Layer, rms, rotary, rotate
from grid_model.pictures import TOKENS
from grid_model.scenes import Question, Scene
from grid_model.sizes import GROUP, HEAD_DIM, KV_HEADS, LAYERS
from grid_model.words import VOCAB_SIZE
from vlcache_connector.types import Run

SPAN = TOKENS * TOKENS  # tokens of a picture
Follow = Callable[[Tensor, Tensor], Tensor]
"""How each token of a picture follows the change that recomputation made to some of them: weights [SPAN, samples],
given its entry [layers, 2, SPAN, heads, dim] and the samples' numbers [samples]. They serve all layers.
"""


@dataclass(frozen=True)
class GridModel:
    language: Language
    tables: tuple[Tensor, Tensor]  # see `feature_table`

    @property
    def layers(self) -> list[Layer]:
        return [layer for layer in self.language.layers if isinstance(layer, Layer)]


@dataclass(frozen=True)
class Prompt:
    """A scene up to its last picture, as the layers take it."""

    x: Tensor  # [tokens, 128] embeddings
    deep: Tensor  # the same shape: DeepStack features, zero at text
    at: Tensor  # [3, tokens] positions
    is_image: Tensor  # [tokens]
    end: int  # the position behind it

    @property
    def text(self) -> Tensor:
        """Indices of the tokens that belong to no picture."""
        return (~self.is_image).nonzero()[:, 0]

    @property
    def spans(self) -> Tensor:
        """Indices of image tokens, [pictures, SPAN]."""
        return self.is_image.nonzero()[:, 0].view(-1, SPAN)


def load(folder: Path) -> GridModel:
    """The checkpoint in `folder`, in float32."""
    language, encoder, stored = Language(VOCAB_SIZE), Encoder(), load_file(folder / "model.safetensors")
    for name, weight in named_weights(language.state_dict(), encoder.state_dict()).items():
        weight.copy_(stored[name])  # named weights share memory with the modules
    with torch.no_grad():
        return GridModel(language, feature_table(encoder))


def prompt_of(model: GridModel, scene: Scene) -> Prompt:
    prefix = prefix_of(scene, 4, np.random.default_rng(0), 0)  # all four tokens of each cell: nothing is drawn
    ids = torch.tensor(prefix.ids)
    content, place, is_image = torch.from_numpy(prefix.content), torch.from_numpy(prefix.place), ids == IMAGE
    x = model.language.embed[ids].detach().clone()
    deep = torch.zeros_like(x)
    x[is_image], deep[is_image] = (table[content, place] for table in model.tables)
    return Prompt(x, deep, torch.from_numpy(prefix.at).float(), is_image, prefix.end)


def part_of(prompt: Prompt, kept: Tensor) -> Prompt:
    """The tokens of a prompt that are marked, at the positions they have, as if there were no others."""
    return Prompt(prompt.x[kept], prompt.deep[kept], prompt.at[:, kept], prompt.is_image[kept], prompt.end)


@torch.no_grad()
def exact(model: GridModel, prompt: Prompt) -> Tensor:
    """KV of a prompt: [layers, 2, tokens, heads, dim]."""
    kv = torch.zeros(LAYERS, 2, len(prompt.x), KV_HEADS, HEAD_DIM)
    compute(model, prompt, kv, torch.arange(len(prompt.x)))
    return kv


def entries_alone(model: GridModel, scene: Scene) -> list[Tensor]:
    """KV of each picture of a scene as it is shown first, behind the opening of the chat template only."""
    return [entry(model, Scene(scene.pictures[i : i + 1])) for i in range(len(scene.pictures))]


def entry(model: GridModel, scene: Scene) -> Tensor:
    """KV of the last picture of a scene: [layers, 2, SPAN, heads, dim]."""
    prompt = prompt_of(model, scene)
    return exact(model, prompt)[:, :, prompt.spans[-1]]


def arranged(prompt: Prompt, entries: Sequence[Tensor], kv: Tensor) -> Tensor:
    """A copy of the prompt's `kv` with entries in the places of its pictures."""
    copy = kv.clone()
    for span, stored in zip(prompt.spans, entries, strict=True):
        copy[:, :, span] = stored
    return copy


def stay(entry: Tensor, samples: Tensor) -> Tensor:
    """Reused tokens keep their stored KV."""
    return torch.zeros(SPAN, len(samples))


def reuse(
    model: GridModel,
    prompt: Prompt,
    entries: Sequence[Tensor],
    recomputed: Sequence[Sequence[Run]],
    follow: Follow = stay,
) -> Tensor:
    """KV of a prompt whose pictures are reused but for the `recomputed` runs of each, which the others `follow`."""
    kv = arranged(prompt, entries, torch.zeros(LAYERS, 2, len(prompt.x), KV_HEADS, HEAD_DIM))
    samples = [tokens_of(runs) for runs in recomputed]
    weights = [
        follow(stored, tokens) if len(tokens) else stay(stored, tokens)
        for stored, tokens in zip(entries, samples, strict=True)
    ]
    chosen = [span[tokens] for span, tokens in zip(prompt.spans, samples, strict=True)]
    rows = torch.cat([prompt.text, *chosen]).sort().values

    def move(stored: Tensor, fresh: Tensor) -> None:
        for span, tokens, weight in zip(prompt.spans, chosen, weights, strict=True):
            change = fresh[:, torch.searchsorted(rows, tokens)] - stored[:, tokens]
            stored[:, span] += torch.einsum("ts,cshd->cthd", weight, change)

    compute(model, prompt, kv, rows, move)
    return kv


def tokens_of(runs: Sequence[Run]) -> Tensor:
    return torch.cat([torch.arange(0), *[torch.arange(run.start, run.end) for run in runs]])


@torch.no_grad()
def compute(
    model: GridModel, prompt: Prompt, kv: Tensor, rows: Tensor, move: Callable[[Tensor, Tensor], None] | None = None
) -> None:
    """Run the tokens `rows` (sorted) through the layers over `kv`, and write theirs into it.

    `move` is given the stored KV of a layer, which it may change, and the fresh one of the rows.
    """
    x, past = prompt.x[rows], rows[:, None] >= torch.arange(len(prompt.x))
    every_turn, turn = turn_of(prompt.at), turn_of(prompt.at[:, rows])
    for index, layer in enumerate(model.layers):
        normed = rms(x, layer.input_norm)
        fresh = torch.stack((heads_of(normed, layer.k, layer.k_norm), heads_of(normed, layer.v)))
        if move is not None:
            move(kv[index], fresh)
        kv[index, :, rows] = fresh
        q = rotate(heads_of(normed, layer.q, layer.q_norm).transpose(0, 1), *turn)
        k, v = (t.transpose(0, 1) for t in kv[index])
        k, v = (t.repeat_interleave(GROUP, 0) for t in (rotate(k, *every_turn), v))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=past)
        x = layer.finish(x[None], attended[None])[0]
        if index == 0:
            x = x + prompt.deep[rows]


def heads_of(normed: Tensor, weight: Tensor, norm: Tensor | None = None) -> Tensor:
    """[tokens, heads, dim], not rotated."""
    heads = (normed @ weight.T).unflatten(-1, (-1, HEAD_DIM))
    return heads if norm is None else rms(heads, norm)


def turn_of(at: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [1, tokens, dim]."""
    cos, sin = rotary(at[:, None])
    return cos[0], sin[0]


@dataclass(frozen=True)
class Answers:
    """To each of several questions about one prompt."""

    right: Tensor  # [questions]: all tokens of the answer, and its end
    logits: Tensor  # [answer tokens of all questions, vocabulary]
    question: Tensor  # [answer tokens]: whose they are

    def divergence(self, other: Answers) -> Tensor:
        """KL (nats) of the other's answer from this one's, averaged over the tokens of each answer: [questions]."""
        ours, theirs = self.logits.log_softmax(-1), other.logits.log_softmax(-1)
        each = (ours.exp() * (ours - theirs)).sum(-1)
        total = torch.zeros(len(self.right)).index_add(0, self.question, each)
        return total / torch.bincount(self.question)


@torch.no_grad()
def answer(model: GridModel, prompt: Prompt, kv: Tensor, questions: Sequence[Question]) -> Answers:
    """What the model says to each question behind the prompt; a question does not see the others."""
    length = max(len(q.words) + len(q.answer) for q in questions)
    branches = torch.tensor([branch_of(q, length) for q in questions])
    ids, labels = branches[:, 0], branches[:, 1]
    y, _ = ask(model, prompt, kv, ids)
    logits = rms(y, model.language.norm).view(*ids.shape, -1) @ model.language.embed.T
    is_right = ((logits.argmax(-1) == labels) | (labels < 0)).all(1)
    said = (labels >= 0) & (labels != END)
    return Answers(is_right, logits[said], said.nonzero()[:, 0])


def ask(model: GridModel, prompt: Prompt, kv: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run branches `ids` [branches, length] behind a prompt, each as if the others were not there.

    Returns their hidden states [branches x length, 128], and how much they look at each token of the prompt: attention
    times the value's norm, summed over layers, heads and branches, [tokens].
    """
    number, length = ids.shape
    tokens, y, looks = len(prompt.x), model.language.embed[ids.flatten()], torch.zeros(len(prompt.x))
    turn = turn_of(prompt.at)
    own_turn = turn_of(torch.arange(prompt.end, prompt.end + length).float().repeat(number).expand(3, -1))
    own = torch.block_diag(*[torch.ones(length, length).tril()] * number).bool()
    seen = torch.cat((torch.ones(len(own), tokens, dtype=torch.bool), own), 1)
    for index, layer in enumerate(model.layers):
        normed = rms(y, layer.input_norm)
        q, k = (heads_of(normed, *w).transpose(0, 1) for w in ((layer.q, layer.q_norm), (layer.k, layer.k_norm)))
        stored_k, stored_v = kv[index].transpose(1, 2)
        k = torch.cat((rotate(stored_k, *turn), rotate(k, *own_turn)), 1).repeat_interleave(GROUP, 0)
        v = torch.cat((stored_v, heads_of(normed, layer.v).transpose(0, 1)), 1).repeat_interleave(GROUP, 0)
        logits = rotate(q, *own_turn) @ k.transpose(-1, -2) * HEAD_DIM**-0.5
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        looks += (weights[:, :, :tokens].sum(1) * v[:, :tokens].norm(dim=-1)).sum(0)
        y = layer.finish(y[None], (weights @ v)[None])[0]
    return y, looks
