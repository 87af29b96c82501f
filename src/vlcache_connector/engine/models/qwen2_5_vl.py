"""Layer adapter of Qwen2.5-VL: M-RoPE in contiguous sections, encoder output enters before the first layer only."""

from typing import Any

from vlcache_connector.engine.models.qwen_vl import QwenVLStack


class Qwen25VLStack(QwenVLStack):
    @classmethod
    def embedding_width(cls, hf_config: Any) -> int:
        return int(hf_config.vision_config.out_hidden_size)
