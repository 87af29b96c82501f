"""Small checkpoints of real model families with random weights and a tokenizer of their own, built without a download.

Tests and examples serve them with the real engine. The folder has everything that vLLM asks a checkpoint for; weights
are large enough that attention, positions and images decide the next token, so that an error in any of them shows.

    python tests/checkpoints.py qwen3_vl out/tiny --hidden 256 --layers 4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

Family = Literal["qwen2_5_vl", "qwen3_vl"]

HEAD_DIM = 64  # the engine's CPU attention supports 32, 64, 80, 96, 112, 128, ...
VOCAB_SIZE = 2048
MERGE_SIZE = 2  # 2x2 patches become one token
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Content is a string, or a list of text, image and video parts in any order.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ('image', 'image_url') -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part['type'] in ('video', 'video_url') -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif part['type'] == 'text' -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_checkpoint(
    folder: Path,
    family: Family,
    *,
    hidden: int,
    layers: int,
    vision_hidden: int = 128,
    vision_depth: int = 2,
    dtype: str = "bfloat16",
    seed: int = 0,
    max_pixels: int = 1024 * 1024,
) -> Path:
    """Writes a checkpoint into `folder` and returns it.

    `hidden` must be a multiple of 128: heads have 64 dimensions and two of them share one KV head. `max_pixels` bounds
    an image after resizing; a token stands for 28x28 (Qwen2.5-VL) or 32x32 pixels (Qwen3-VL).
    """
    if hidden % (2 * HEAD_DIM) or vision_hidden % HEAD_DIM:
        raise ValueError(f"hidden must be a multiple of {2 * HEAD_DIM}, vision_hidden of {HEAD_DIM}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    text: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": dtype,
    }
    vision: dict[str, Any] = {
        "depth": vision_depth,
        "hidden_size": vision_hidden,
        "intermediate_size": 2 * vision_hidden,
        "num_heads": vision_hidden // HEAD_DIM,
        "out_hidden_size": hidden,
        "spatial_merge_size": MERGE_SIZE,
    }
    complete_config = complete_qwen2_5_vl if family == "qwen2_5_vl" else complete_qwen3_vl
    complete_config(text, vision)
    config = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=vision,
        dtype=dtype,
        tie_word_embeddings=False,
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in {
                "image": "image_pad",
                "video": "video_pad",
                "vision_start": "vision_start",
                "vision_end": "vision_end",
            }.items()
        },
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    weights = random_weights(model.state_dict(), getattr(torch, dtype), seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_preprocessors(folder, family, vision["patch_size"], max_pixels)
    return folder


def complete_qwen2_5_vl(text: dict[str, Any], vision: dict[str, Any]) -> None:
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    depth = vision["depth"]
    vision |= {
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": list(range((depth - 1) % 2, depth, 2)),  # every second block, the last one included
    }


def complete_qwen3_vl(text: dict[str, Any], vision: dict[str, Any]) -> None:
    text["head_dim"] = HEAD_DIM
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    }
    vision |= {
        "patch_size": 16,
        "num_position_embeddings": 48 * 48,
        # Level i of these DeepStack features is added behind decoder layer i.
        "deepstack_visual_indexes": list(range(min(3, vision["depth"], text["num_hidden_layers"]))),
    }


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on sources of the standard library, with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    tokenizer.train(
        [str(source) for source in sources],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )


def random_weights(shapes: dict[str, torch.Tensor], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Weights with peaked attention (its logits deviate by 2.3) and small embeddings, so that context outweighs them.

    Seen at 4 and 12 layers: swapping two pictures, or other text before them, moves the next token's logits (standard
    deviation 1.2) by 0.4 to 1.0; computing in bfloat16 instead of float32 moves them by 0.02 to 0.03.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            values = 1.5 + 0.1 * values
        elif "norm" in name and name.endswith(".weight"):
            values = 1.0 + 0.1 * values
        elif name.endswith(".bias"):
            values *= 0.1
        elif name.endswith("embed_tokens.weight"):
            values *= 0.3
        elif not name.endswith("pos_embed.weight"):
            gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.2
            values *= gain / shape[0].numel() ** 0.5  # inputs per output, of linear layers and the patch convolution
        weights[name] = values.to(dtype)
    return weights


def write_preprocessors(folder: Path, family: Family, patch_size: int, max_pixels: int) -> None:
    is_qwen3 = family == "qwen3_vl"
    common = {
        "processor_class": "Qwen3VLProcessor" if is_qwen3 else "Qwen2_5_VLProcessor",
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5] if is_qwen3 else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5, 0.5, 0.5] if is_qwen3 else [0.26862954, 0.26130258, 0.27577711],
    }
    smallest = 4 * (patch_size * MERGE_SIZE) ** 2
    write_json(
        folder / "preprocessor_config.json",
        common
        | {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": smallest, "longest_edge": max_pixels},
        },
    )
    if is_qwen3:
        write_json(
            folder / "video_preprocessor_config.json",
            common
            | {
                "video_processor_type": "Qwen3VLVideoProcessor",
                "size": {"shortest_edge": smallest, "longest_edge": 8 * max_pixels},  # of all frames together
            },
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def cached_checkpoint(
    family: Family, hidden: int, layers: int, *, root: Path = Path(".checkpoints"), **options: Any
) -> Path:
    """The checkpoint with these sizes and `options` of `build_checkpoint` below `root`; built when it is not there.

    It appears under its final name only when it is complete, so interrupted and concurrent calls do no harm. The name
    holds a digest of this file and the options: a checkpoint of an older version is not found.
    """
    digest = hashlib.sha256(Path(__file__).read_bytes() + json.dumps(options, sort_keys=True).encode()).hexdigest()
    folder = root / f"{family}-{hidden}x{layers}-{digest[:12]}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=root) as scratch:
            built = build_checkpoint(Path(scratch, family), family, hidden=hidden, layers=layers, **options)
            try:
                built.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise somebody else was faster
                    raise
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a small checkpoint with random weights.")
    parser.add_argument("family", choices=get_args(Family))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vision-hidden", type=int, default=128)
    parser.add_argument("--vision-depth", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-pixels", type=int, default=1024 * 1024)
    options = vars(parser.parse_args())
    print(build_checkpoint(options.pop("folder"), options.pop("family"), **options))


if __name__ == "__main__":
    main()
