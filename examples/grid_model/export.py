"""Writes a trained grid model as a Qwen3-VL checkpoint that transformers and vLLM load as it is.

cd examples && python -m grid_model.export RUN/state.safetensors FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from grid_model import sizes
from grid_model.pictures import PATCH
from grid_model.run_state import load_state
from grid_model.words import ID, SPECIAL_TOKENS, VOCAB_SIZE, WORDS

# The answer follows the question at once: <|im_start|> text and pictures, answer <|im_end|>.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] != 'assistant' -%}{{- '<|im_start|>' -}}{%- endif -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ('image', 'image_url') -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part['type'] == 'text' -%}
        {{- ' ' + part['text'] + ' ' -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}{{- ' <|im_end|>' -}}{%- endif -%}
{%- endfor -%}
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces."""
    vocabulary = ID | {f"<|spare_{i}|>": i for i in range(len(WORDS), VOCAB_SIZE)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unknown|>",
        additional_special_tokens=SPECIAL_TOKENS[1:-1],
        chat_template=CHAT_TEMPLATE,
    )


def configuration() -> Any:
    return AutoConfig.for_model(
        "qwen3_vl",
        architectures=["Qwen3VLForConditionalGeneration"],
        dtype="bfloat16",
        tie_word_embeddings=False,
        image_token_id=ID["<|image_pad|>"],
        video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"],
        text_config={
            "hidden_size": sizes.HIDDEN,
            "intermediate_size": sizes.MLP,
            "num_hidden_layers": sizes.LAYERS,
            "num_attention_heads": sizes.HEADS,
            "num_key_value_heads": sizes.KV_HEADS,
            "head_dim": sizes.HEAD_DIM,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": ID["<|im_end|>"],
            "dtype": "bfloat16",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": sizes.ROPE_THETA,
                "mrope_section": list(sizes.MROPE_SECTION),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": sizes.VISION_DEPTH,
            "hidden_size": sizes.VISION_HIDDEN,
            "intermediate_size": sizes.VISION_MLP,
            "num_heads": 2,
            "out_hidden_size": sizes.HIDDEN,
            "spatial_merge_size": 2,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "num_position_embeddings": sizes.SIDE**2,
            "deepstack_visual_indexes": [0],
        },
    )


def named_weights(language: dict[str, Tensor], encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of transformers' Qwen3-VL."""
    visual, text, width = "model.visual.", "model.language_model.", sizes.VISION_HIDDEN
    named = {
        visual + "patch_embed.proj.weight": encoder["patch_embed.weight"].view(width, 3, 2, PATCH, PATCH),
        visual + "patch_embed.proj.bias": encoder["patch_embed.bias"],
        visual + "pos_embed.weight": encoder["pos_embed.weight"],
        text + "embed_tokens.weight": language["embed"],
        text + "norm.weight": language["norm"],
        "lm_head.weight": language["embed"].clone(),
    }
    for name, value in encoder.items():
        if name.startswith("merger."):
            named[visual + name] = value
        elif name.startswith("deepstack."):
            named[visual + name.replace("deepstack", "deepstack_merger_list.0")] = value
    for index in range(sizes.VISION_DEPTH):
        block = f"{visual}blocks.{index}."
        for part in ("weight", "bias"):
            named[f"{block}norm1.{part}"] = torch.ones(width) if part == "weight" else torch.zeros(width)
            named[f"{block}norm2.{part}"] = encoder[f"norm2.{index}.{part}"]
            named[f"{block}mlp.linear_fc1.{part}"] = encoder[f"fc1.{index}.{part}"]
            named[f"{block}mlp.linear_fc2.{part}"] = encoder[f"fc2.{index}.{part}"]
        for name, rows in (("qkv", 3 * width), ("proj", width)):  # attention writes nothing: see model.py
            named[f"{block}attn.{name}.weight"] = torch.zeros(rows, width)
            named[f"{block}attn.{name}.bias"] = torch.zeros(rows)
    places = {
        "input_norm": "input_layernorm",
        "post_norm": "post_attention_layernorm",
        **{name: f"self_attn.{name}" for name in ("q_norm", "k_norm")},
        **{name: f"self_attn.{name}_proj" for name in "qkvo"},
        **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }
    for index in range(sizes.LAYERS):
        for ours, theirs in places.items():
            named[f"{text}layers.{index}.{theirs}.weight"] = language[f"layers.{index}.{ours}"]
    return named


def export(state: dict[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    configuration().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    weights = named_weights(state["language"], state["encoder"])
    save_file(
        {name: value.to(dtype).contiguous() for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    processing = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    smallest, largest = (2 * PATCH) ** 2, 256 * 256
    for name, kind, most in (
        ("preprocessor_config", {"image_processor_type": "Qwen2VLImageProcessor"}, largest),
        ("video_preprocessor_config", {"video_processor_type": "Qwen3VLVideoProcessor"}, 8 * largest),
    ):
        content = processing | kind | {"size": {"shortest_edge": smallest, "longest_edge": most}}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    export(load_state(options.state), options.folder)
