"""Layer adapter of Qwen3-VL: interleaved M-RoPE, QK-norm inside the layers, DeepStack levels added after the first
layers.

The engine keeps DeepStack rows in buffers of the model that are filled before a forward; a pass that called the
model's own `embed_input_ids` or `forward` would overwrite those of the running step. So the pass hands its own to the
decoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.sequence import IntermediateTensors

from vlcache_connector.engine.models.qwen_vl import QwenVLStack


class Qwen3VLStack(QwenVLStack):
    @classmethod
    def embedding_width(cls, hf_config: Any) -> int:
        vision = hf_config.vision_config
        return int(vision.out_hidden_size) * (1 + len(vision.deepstack_visual_indexes))

    def split_embedding(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        return rows.split(self._model.visual_dim, dim=-1)

    def levels(self, hidden: torch.Tensor, added: Sequence[torch.Tensor]) -> dict[str, Any]:
        rows = added or [torch.zeros_like(hidden)] * self._model.deepstack_num_level
        named = {f"deepstack_input_embeds_{level}": each for level, each in enumerate(rows)}
        return {"deepstack_input_embeds": IntermediateTensors(named)}
