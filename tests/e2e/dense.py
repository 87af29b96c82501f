"""An independent computation of what a recompute pass must leave in the pages: transformers' own layers, dense
attention.

Reused rows of keys and values are given; every other token is computed from its hidden state, layer by layer, and
attends to all tokens before it. No paged cache, no virtual sequences, no vLLM.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb


class DenseModel:
    """A checkpoint in float32, as transformers computes it."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._text = self._model.model.language_model

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions [3, n]."""
        cos, sin = self._text.rotary_emb(torch.zeros(1, dtype=torch.float32), positions[:, None])
        return cos, sin

    def rotate(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rows [n, heads, dim] under the model's own rotary code."""
        heads_first = rows.transpose(0, 1)[None]
        turned, _ = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
        return turned[0].transpose(0, 1)

    @torch.inference_mode()
    def recompute(
        self,
        token_ids: Sequence[int],
        positions: torch.Tensor,
        computed: torch.Tensor,
        known: torch.Tensor,
        embeddings: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Keys and values [layers, 2, n, heads, dim] of all tokens.

        `computed` [n], or [layers, n] where each layer has some of those of the one before, names the tokens to
        compute; `known` holds the rows of all others. Each of `embeddings` are tokens and their encoder output.
        """
        text, n = self._text, computed.shape[-1]
        by_layer = computed.expand(len(text.layers), -1)
        where = by_layer[0].nonzero().flatten()
        width = text.config.hidden_size
        hidden = text.embed_tokens(torch.tensor(token_ids)[:n])
        levels: list[torch.Tensor] = []
        for tokens, rows in embeddings:
            inside = tokens < n
            pieces = rows[inside].float().split(width, dim=-1)
            hidden[tokens[inside]] = pieces[0]
            levels = levels or [torch.zeros_like(hidden) for _ in pieces[1:]]
            for level, piece in zip(levels, pieces[1:], strict=True):
                level[tokens[inside]] = piece
        hidden = hidden[where]
        cos, sin = self.rotary(positions[:, :n])
        out = known.clone()
        for number, layer in enumerate(text.layers):
            hidden, where = hidden[by_layer[number, where]], by_layer[number].nonzero().flatten()
            hidden = self._layer(layer, hidden, where, cos, sin, out[number])
            if number < len(levels):
                hidden = hidden + levels[number][where]
        return out

    def _layer(
        self,
        layer: Any,
        hidden: torch.Tensor,
        where: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
    ) -> torch.Tensor:
        """One decoder layer over the computed tokens; writes their keys and values into `kv` [2, n, heads, dim]."""
        attention, rows = layer.self_attn, layer.input_layernorm(hidden)
        dim = kv.shape[-1]

        def heads_of(projection: Callable[[torch.Tensor], torch.Tensor], norm: str) -> torch.Tensor:
            heads = projection(rows).view(len(where), -1, dim)
            return getattr(attention, norm)(heads) if hasattr(attention, norm) else heads

        at = (cos[..., where, :], sin[..., where, :])
        queries = self.rotate(heads_of(attention.q_proj, "q_norm"), *at)
        kv[0, where] = self.rotate(heads_of(attention.k_proj, "k_norm"), *at)
        kv[1, where] = attention.v_proj(rows).view(len(where), -1, dim)
        group = queries.shape[1] // kv.shape[2]
        keys, values = (kv[i].repeat_interleave(group, dim=1) for i in (0, 1))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * dim**-0.5
        is_later = torch.arange(kv.shape[1])[None, :] > where[:, None]
        weights = scores.masked_fill(is_later, float("-inf")).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, values).reshape(len(where), -1)
        hidden = hidden + attention.o_proj(mixed)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
