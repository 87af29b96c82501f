"""Layer adapter of Qwen2.5-VL: M-RoPE in contiguous sections, encoder output enters before the first layer only."""

from collections.abc import Sequence
from typing import Any

import torch

from vlcache_connector.engine.models.qwen_vl import QwenVLStack


class Qwen25VLStack(QwenVLStack):
    @classmethod
    def embedding_width(cls, hf_config: Any) -> int:
        return int(hf_config.vision_config.out_hidden_size)

    def split_embedding(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        return (rows,)
