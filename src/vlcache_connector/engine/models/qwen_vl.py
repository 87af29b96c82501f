"""What Qwen2.5-VL and Qwen3-VL have in common: M-RoPE positions and a Qwen decoder below `language_model.model`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vlcache_connector.errors import UnsupportedModelError
from vlcache_connector.exec.model import Media, Prompt, run_layers
from vlcache_connector.exec.rope import Rope


@dataclass(frozen=True, slots=True)
class _Field:
    """The one attribute of vLLM's processed media fields that the position functions read."""

    data: torch.Tensor


class QwenVLStack:
    """Layer adapter; see `exec.model.LayerStack`."""

    def __init__(self, model: Any, positions: torch.Tensor | None) -> None:
        self._model = model
        self._decoder = model.language_model.model
        self._positions = positions
        self.rope = _rope_of(self._decoder.layers[0].self_attn.rotary_emb)

    @classmethod
    def attach(cls, model: torch.nn.Module, positions: torch.Tensor | None) -> Self:
        return cls(model, positions)

    @property
    def num_layers(self) -> int:
        return len(self._decoder.layers)

    def positions(self, prompt: Prompt) -> torch.Tensor:
        features = [_feature_of(media) for media in prompt.media]
        positions, _ = self._model.get_mrope_input_positions(list(prompt.token_ids), features)
        return positions

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        # Placeholder ids may lie outside the vocabulary; their rows are overwritten with encoder output afterwards.
        in_vocabulary = token_ids.clamp(max=self._decoder.vocab_size - 1)
        return self._decoder.embed_tokens(in_vocabulary).clone()

    def split_embedding(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        return (rows,)

    def run_layer(
        self, layer: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._decoder.layers[layer](positions, hidden, residual)

    def run(self, positions: torch.Tensor, hidden: torch.Tensor, added: Sequence[torch.Tensor]) -> None:
        if not self._is_ready or self._positions is None:
            run_layers(self, range(self.num_layers), positions, hidden, None, added)
            return
        as_engine = self._positions[:, : len(hidden)]
        as_engine.copy_(positions)
        inputs = self.levels(hidden, added)
        self._decoder(input_ids=None, positions=as_engine, intermediate_tensors=None, inputs_embeds=hidden, **inputs)

    def levels(self, hidden: torch.Tensor, added: Sequence[torch.Tensor]) -> dict[str, Any]:
        """What the decoder is given besides, to add `added` after its first layers."""
        return {}

    @property
    def _is_ready(self) -> bool:
        """Whether a call of the decoder compiles nothing, and leaves nothing behind when a pass ends within it: what
        vLLM sets around graphs that Inductor partitions would stay.
        """
        decoder = self._decoder
        if decoder.do_not_compile:
            return True
        is_compiled = getattr(decoder, "compiled", False) or getattr(decoder, "aot_compiled_fn", None) is not None
        return is_compiled and not decoder.compilation_config.use_inductor_graph_partition

    def logits(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor | None:
        normed, _ = self._decoder.norm(hidden, residual)
        found: torch.Tensor | None = self._model.compute_logits(normed)
        return found


def _feature_of(media: Media) -> MultiModalFeatureSpec:
    """The item as far as the position functions read it."""
    data: dict[str, Any] = {f"{media.modality}_grid_thw": _Field(torch.tensor(media.grid))}
    if media.seconds is not None:
        data["second_per_grid_ts"] = _Field(torch.tensor(media.seconds, dtype=torch.float64))
    place = PlaceholderRange(media.offset, media.length)
    return MultiModalFeatureSpec(data=data, modality=media.modality, identifier="", mm_position=place)


def _rope_of(rotary: Any) -> Rope:
    """The rotation of a live rotary embedding, checked against the table that the engine itself uses."""
    if type(rotary) is not MRotaryEmbedding:
        raise UnsupportedModelError(f"rotary embedding {type(rotary).__name__} was not verified for re-positioning")
    inv_freq = rotary._compute_inv_freq(rotary.base).float().cpu()
    _check_against_table(inv_freq, rotary)
    return Rope(inv_freq, rotary.is_neox_style, _channels_of(rotary))


def _channels_of(rotary: Any) -> torch.Tensor:
    """The position channel (time, height, width) that turns each pair of dimensions: int64 [rotary_dim / 2]."""
    sections = rotary.mrope_section
    if not rotary.mrope_interleaved:
        return torch.arange(3).repeat_interleave(torch.tensor(sections))
    channels = torch.zeros(sum(sections), dtype=torch.int64)
    for channel in (1, 2):
        channels[channel : 3 * sections[channel] : 3] = channel
    return channels


def _check_against_table(inv_freq: torch.Tensor, rotary: Any) -> None:
    """Position 1 and a far one must give the engine's cosines, up to the rounding of the table's dtype."""
    table = rotary.cos_sin_cache
    for position in (1, min(1000, len(table) - 1)):
        cos, sin = (inv_freq * position).cos(), (inv_freq * position).sin()
        wanted = rotary.mscale * torch.cat((cos, sin))
        # One rounding of values up to mscale, and the fp32 error of an angle of `position` radians.
        bound = rotary.mscale * (torch.finfo(table.dtype).eps + 2 * position * torch.finfo(torch.float32).eps)
        gap = (table[position].float().cpu() - wanted).abs().max().item()
        if gap > bound:
            raise UnsupportedModelError(
                f"the engine's rotary table differs from the plain rotation by {gap:.2e} at position {position}; "
                "this rope scaling was not verified for re-positioning"
            )
