"""The grid model in plain PyTorch, laid out for cheap training; `export.py` writes it as a Qwen3-VL checkpoint.

The encoder's attention writes nothing (its output projection stays zero), so a visual token depends on its own pixels
and position alone. All pictures then come from one table, and a training step costs only the language model.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from grid_model.sizes import (
    EPS,
    GROUP,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MLP,
    MROPE_SECTION,
    PATCH_VALUES,
    ROPE_THETA,
    SIDE,
    VISION_DEPTH,
    VISION_HIDDEN,
    VISION_MLP,
)
from grid_model.start import Heads, counting, first_words, looking_back, reading_legend, reading_names, similar

COPYING = (0.3, 0.3, 0.3, 0.2, 0.1)  # how much of what its heads find a layer passes on at first


class Merger(nn.Module):
    """Four patches to one token; the norm of a DeepStack merger comes behind the shuffle."""

    def __init__(self, deepstack: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(VISION_HIDDEN * 4 if deepstack else VISION_HIDDEN, eps=EPS)
        self.linear_fc1 = nn.Linear(VISION_HIDDEN * 4, VISION_HIDDEN * 4)
        self.linear_fc2 = nn.Linear(VISION_HIDDEN * 4, HIDDEN)
        self.deepstack = deepstack

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(-2)) if self.deepstack else self.norm(x).flatten(-2)
        tokens: Tensor = self.linear_fc2(functional.gelu(self.linear_fc1(x)))
        return tokens


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(PATCH_VALUES, VISION_HIDDEN)
        self.pos_embed = nn.Embedding(SIDE * SIDE, VISION_HIDDEN)
        nn.init.normal_(self.pos_embed.weight, std=0.5)
        self.norm2 = nn.ModuleList(nn.LayerNorm(VISION_HIDDEN, eps=EPS) for _ in range(VISION_DEPTH))
        self.fc1 = nn.ModuleList(nn.Linear(VISION_HIDDEN, VISION_MLP) for _ in range(VISION_DEPTH))
        self.fc2 = nn.ModuleList(nn.Linear(VISION_MLP, VISION_HIDDEN) for _ in range(VISION_DEPTH))
        self.merger = Merger(deepstack=False)
        self.deepstack = Merger(deepstack=True)

    def forward(self, patches: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (..., 128) and their DeepStack features from patches (..., 4, 384) at token rows and columns (...)."""
        corner = torch.arange(4, device=rows.device)
        index = (2 * rows[..., None] + corner // 2) * SIDE + 2 * columns[..., None] + corner % 2
        x = self.patch_embed(patches) + self.pos_embed(index)
        features = []
        for norm, fc1, fc2 in zip(self.norm2, self.fc1, self.fc2, strict=True):
            x = x + fc2(functional.gelu(fc1(norm(x)), approximate="tanh"))
            features.append(x)
        return self.merger(x), self.deepstack(features[0])


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, EPS)


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (batch, 1, tokens, 64) of positions (3, batch, tokens): interleaved M-RoPE, as in Qwen3-VL."""
    inverse = ROPE_THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = positions[..., None] * inverse
    mixed = angles[0].clone()
    for axis in (1, 2):
        chosen = slice(axis, MROPE_SECTION[axis] * 3, 3)
        mixed[..., chosen] = angles[axis][..., chosen]
    mixed = torch.cat((mixed, mixed), -1)
    return mixed.cos()[:, None], mixed.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = HEAD_DIM // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Layer(nn.Module):
    def __init__(self, start: Heads, copying: float) -> None:
        super().__init__()
        self.input_norm = nn.Parameter(torch.ones(HIDDEN))
        self.post_norm = nn.Parameter(torch.ones(HIDDEN))
        self.q_norm = nn.Parameter(torch.full((HEAD_DIM,), start.sharpness))
        self.k_norm = nn.Parameter(torch.full((HEAD_DIM,), start.sharpness))
        self.q = nn.Parameter(start.q + 0.005 * torch.randn_like(start.q))
        self.k = nn.Parameter(start.k.clone())
        self.v = nn.Parameter(start.v.clone())
        self.o = nn.Parameter(copying * start.o + 0.02 * torch.randn_like(start.o))
        self.gate = nn.Parameter(torch.randn(MLP, HIDDEN) / HIDDEN**0.5)
        self.up = nn.Parameter(torch.randn(MLP, HIDDEN) / HIDDEN**0.5)
        self.down = nn.Parameter(0.1 * torch.randn(HIDDEN, MLP) / MLP**0.5)

    def keys(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, KV heads, tokens, 64) of normed x (batch, tokens, 128)."""
        k = rms((x @ self.k.T).unflatten(-1, (KV_HEADS, HEAD_DIM)), self.k_norm).transpose(1, 2)
        v = (x @ self.v.T).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
        return rotate(k, *turn), v

    def queries(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q = rms((x @ self.q.T).unflatten(-1, (HEADS, HEAD_DIM)), self.q_norm).transpose(1, 2)
        return rotate(q, *turn)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended.transpose(1, 2).flatten(2) @ self.o.T
        y = rms(x, self.post_norm)
        return x + (functional.silu(y @ self.gate.T) * (y @ self.up.T)) @ self.down.T


class Language(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        words = first_words(vocab_size)
        self.embed = nn.Parameter(0.15 * HIDDEN**0.5 * words.rows)
        starts = [looking_back(words), counting(words), reading_legend(words), reading_names(words)]
        starts += [similar() for _ in range(LAYERS - len(starts))]
        self.layers = nn.ModuleList(Layer(start, c) for start, c in zip(starts, COPYING, strict=True))
        self.norm = nn.Parameter(torch.full((HIDDEN,), 0.5))

    def forward(
        self, prefix: Tensor, deep: Tensor, at: Tensor, unseen: Tensor, branches: Tensor, branch_at: Tensor
    ) -> Tensor:
        """Hidden states (batch, branches, length, 128) of branches that see the prefix and themselves, not each other.

        prefix: (batch, tokens, 128) embeddings, deep: the same shape, DeepStack features (zero at text); at: (3, batch,
        tokens) positions; unseen: (tokens,), which of the prefix branches do not see; branches: (batch, branches,
        length) token ids; branch_at: (length,) positions, or (batch, length).
        """
        batch, count, length = branches.shape
        x, y = prefix, self.embed[branches.flatten(1)]
        turn = rotary(at)
        branch_turn = rotary(branch_at.expand(3, batch, length).repeat(1, 1, count))
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        for index, layer in enumerate(cast(list[Layer], list(self.layers))):
            normed, branch_normed = rms(x, layer.input_norm), rms(y, layer.input_norm)
            k, v = layer.keys(normed, turn)
            branch_k, branch_v = layer.keys(branch_normed, branch_turn)
            y = layer.finish(
                y, branch_attention(layer.queries(branch_normed, branch_turn), k, v, branch_k, branch_v, unseen, future)
            )
            if index + 1 < len(self.layers):  # nobody reads what the last layer makes of the prefix
                x = layer.finish(x, prefix_attention(layer.queries(normed, turn), k, v))
            if index == 0:
                x = x + deep
        return rms(y, self.norm).view(batch, count, length, HIDDEN)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(
        q, k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1), is_causal=True
    )


def branch_attention(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, unseen: Tensor, future: Tensor
) -> Tensor:
    """Attention of branches, laid end to end in q (batch, heads, branches x length, 64)."""
    batch, _, total, _ = q.shape
    length, group, tokens = future.shape[0], GROUP, k.shape[2]
    grouped = q.reshape(batch, KV_HEADS, group * total, HEAD_DIM) * HEAD_DIM**-0.5
    to_prefix = (grouped @ k.transpose(-1, -2)).masked_fill(unseen, float("-inf"))
    to_prefix = to_prefix.view(batch, KV_HEADS, group, total // length, length, tokens)
    split = grouped.view(batch, KV_HEADS, group, total // length, length, HEAD_DIM)
    own_k, own_v = (t.reshape(batch, KV_HEADS, 1, total // length, length, HEAD_DIM) for t in (own_k, own_v))
    to_self = (split @ own_k.transpose(-1, -2)).masked_fill(future, float("-inf"))
    weights = torch.cat((to_prefix, to_self), -1).softmax(-1)
    seen = weights[..., :tokens].reshape(batch, KV_HEADS, group * total, tokens) @ v
    out = seen.view(split.shape) + weights[..., tokens:] @ own_v
    return out.reshape(batch, HEADS, total, HEAD_DIM)
