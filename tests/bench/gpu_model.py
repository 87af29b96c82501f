"""Models for `gpu_engine.py`: shapes of a released one, a small vocabulary, and random weights made on the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoints import VOCAB_SIZE, train_tokenizer, write_preprocessors

PIXELS_PER_TOKEN_SIDE = 32


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int = 4096
    intermediate: int = 12288
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vision_hidden: int = 1152
    vision_intermediate: int = 4304
    vision_depth: int = 27
    vision_heads: int = 16
    deepstack: tuple[int, ...] = (8, 16, 24)

    @property
    def layer_nbytes(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return 2 * (attention + 3 * self.hidden * self.intermediate)

    def kv_nbytes(self, tokens: int) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * 2 * tokens


QWEN3_VL_8B = Shape()
KV_CACHE_PROMPTS = 2  # prompts of full length that the engine's pages hold
TINY = Shape(256, 512, 3, 4, 2, 64, 128, 256, 3, 2, (0, 1, 2))


def fitting(shape: Shape, max_tokens: int) -> Shape:
    """With as many layers as fit into 80 % of the GPU's memory, besides 8 GiB for the encoder and activations."""
    room = 0.8 * torch.cuda.get_device_properties(0).total_memory - 8 * 2**30
    per_layer = shape.layer_nbytes + shape.kv_nbytes(KV_CACHE_PROMPTS * max_tokens) // shape.layers
    return replace(shape, layers=max(4, min(shape.layers, int(room // per_layer))))


def write_model(folder: Path, shape: Shape, max_pixels: int, max_len: int) -> None:
    """Everything that vLLM asks a checkpoint for but weights."""
    from transformers import AutoConfig

    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    quarter = shape.head_dim // 2 // 16
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config={
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": max_len,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "dtype": "bfloat16",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [6 * quarter, 5 * quarter, 5 * quarter],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "spatial_merge_size": 2,
            "patch_size": 16,
            "num_position_embeddings": 48 * 48,
            "deepstack_visual_indexes": list(shape.deepstack),
        },
        dtype="bfloat16",
        tie_word_embeddings=False,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()},
    )
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.save_pretrained(folder)
    write_preprocessors(folder, "qwen3_vl", 16, max_pixels)


def randomise(model: torch.nn.Module) -> None:
    """Weights as in `checkpoints.random_weights`: with those of vLLM's dummy format every token would look alike."""
    for seed, (name, weight) in enumerate(model.named_parameters()):
        mean, deviation = 0.0, 1.2 / weight[0].numel() ** 0.5
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            mean, deviation = 1.5, 0.1
        elif "norm" in name and name.endswith(".weight"):
            mean, deviation = 1.0, 0.1
        elif name.endswith(".bias"):
            deviation = 0.1
        elif name.endswith("embed_tokens.weight"):
            deviation = 0.3
        elif name.endswith("pos_embed.weight"):
            deviation = 1.0
        weight.data.normal_(mean, deviation, generator=torch.Generator(weight.device).manual_seed(seed))


def register_random_weights(load_format: str) -> None:
    """Teach vLLM in this process to load `randomise`d weights, at the point where it would read a checkpoint."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(load_format)
    class RandomWeights(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            randomise(model)
