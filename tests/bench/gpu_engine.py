"""Reuse end to end in the real engine on this machine's GPU: that it is right, and the time to the first token.

    python tests/bench/gpu_engine.py [--attention engine|vlcache] [--results FILE] [--rehearse]

The model has the shapes of Qwen3-VL-8B (fewer layers where memory asks for that, said in the output) but a small
vocabulary, and random weights that make context, positions and images matter. The engine runs eagerly, in this process,
on vLLM's V1 model runner without asynchronous scheduling, as the README says.

1. Recomputing all tokens of known images (ratio 1.0) must agree with plain vLLM. The yardstick is the engine's own
   noise: how far log-probabilities move when plain vLLM serves a prompt computed and from its prefix cache.
2. `bench_ttft.py`'s comparison for prompts of 2k, 8k and 20k image tokens.

`--rehearse` does it with a tiny model on whatever vLLM runs on, to see that this program works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_V2_MODEL_RUNNER="0",
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it would be compiled first

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.bench_ttft import learn, repeat_once
from bench.engine import Engine, VariantError
from bench.results import say, write_json
from bench.ttft_report import Case, print_results, report_json
from checkpoints import VOCAB_SIZE, train_tokenizer, write_preprocessors
from e2e.engine import CONNECTOR, Answer, Ask, Picture, answer_of, request_of

PIXELS_PER_TOKEN_SIDE = 32
RESOLUTION = 2.0**-4  # two logits between 4 and 8, in bfloat16, each off by a unit in the last place


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
TINY = Shape(256, 512, 3, 4, 2, 64, 128, 256, 3, 2, (0, 1, 2))


def fitting(shape: Shape, max_tokens: int) -> Shape:
    """With as many layers as fit into 80 % of the GPU's memory, besides 4 GiB for the encoder and activations."""
    room = 0.8 * torch.cuda.get_device_properties(0).total_memory - 4 * 2**30
    per_layer = shape.layer_nbytes + shape.kv_nbytes(2 * max_tokens) // shape.layers
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


def start(folder: Path, attention: str, max_len: int, host_gib: float) -> Any:
    from vllm import LLM

    register_random_weights("vlcache_random")
    extra = {"host_gib": host_gib, "attention": attention}
    return LLM(
        str(folder),
        load_format="vlcache_random",
        enforce_eager=True,
        async_scheduling=False,
        max_model_len=max_len,
        max_num_seqs=4,
        max_num_batched_tokens=min(8192, max_len),
        gpu_memory_utilization=0.85,
        limit_mm_per_prompt={"image": 4, "video": 0},
        skip_mm_profiling=True,
        enable_mm_processor_stats=True,
        disable_log_stats=False,
        kv_transfer_config=CONNECTOR | {"kv_connector_extra_config": extra},
    )


def answer_alone(llm: Any, ask: Ask, *, is_fresh: bool = True) -> Answer:
    if is_fresh:
        Engine(llm).forget()
    prompt, sampling = request_of(ask)
    (output,) = llm.generate([prompt], [sampling], use_tqdm=False)
    return answer_of(output)


def check_parity(llm: Any) -> dict[str, Any]:
    """Gaps of log-probabilities to plain vLLM. `is_right`: at ratio 1.0 within twice the noise, and everything that
    should have been reused was.
    """
    opening, closing = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    pictures = [Picture(1, 512, 512), Picture(2, 512, 320)]
    for picture in pictures:
        answer_alone(llm, Ask([opening, "first seen here ", picture, closing]))
    noise = 0.0
    for length in range(0, 32, 4):
        ask = Ask([opening, *pictures, " x" * length, closing], "off")
        noise = max(noise, answer_alone(llm, ask).gap(answer_alone(llm, ask, is_fresh=False)))
    scene = [opening, "look at these: ", pictures[1], " and ", pictures[0], "what differs?", closing]
    plain = answer_alone(llm, Ask(scene, "off"))
    reports, gaps = {}, {}
    for ratio in (1.0, 0.05, 0.0):
        answer = answer_alone(llm, Ask(scene, ratio=ratio))
        reports[ratio], gaps[str(ratio)] = answer.report, answer.gap(plain)
    recomputed = reports[1.0]["recomputed_tokens"] > 0 and reports[1.0]["reused_tokens"] == 0
    reused = reports[0.05]["reused_tokens"] > reports[0.05]["recomputed_tokens"] > 0
    is_right = recomputed and reused and gaps["1.0"] <= 2 * noise + RESOLUTION < gaps["0.0"]
    say(f"parity: gaps {gaps}, noise {noise:.2g}, {'right' if is_right else 'WRONG'}")
    return {"is_right": is_right, "noise": noise, "gaps": gaps, "reports": {str(k): v for k, v in reports.items()}}


def case_of(title: str, *sizes: tuple[int, int]) -> Case:
    """Pictures of so many columns and rows of tokens."""
    return Case(title, tuple(("hopper", *size) for size in sizes))


CASES = [
    case_of("2k", (64, 32)),
    case_of("8k", (128, 64)),
    case_of("20k", (128, 64), (128, 64), (64, 64)),
]
REHEARSED = [case_of("2k", (64, 32)), case_of("2 x 1k", (32, 32), (32, 32))]


def measure_ttft(llm: Any, cases: list[Case], repeats: int) -> list[dict[str, Any]]:
    """Raises `VariantError` when a variant is not what its name says."""
    engine, results = Engine(llm), {}
    for case in cases:
        pictures = [
            Picture(100 * case.num_image_tokens + i, columns * PIXELS_PER_TOKEN_SIDE, rows * PIXELS_PER_TOKEN_SIDE)
            for i, (_, columns, rows) in enumerate(case.images)
        ]
        images = [picture.pixels() for picture in pictures]
        num_computed_by = learn(engine, images)
        results[case] = [repeat_once(engine, images, num_computed_by) for _ in range(repeats)]
        times = {name: round(1e3 * one.engine_s) for name, one in results[case][-1].items()}
        say(f"time to the first token, {case.title} image tokens, last of {repeats}: {times} ms")
    print_results(results)
    return report_json(results)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--attention", choices=("engine", "vlcache"), default="engine", help="of recompute passes")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model")
    options = parser.parse_args()
    max_len = 4096 if options.rehearse else 24576
    shape = TINY if options.rehearse else fitting(QWEN3_VL_8B, max_len)
    cases = REHEARSED if options.rehearse else CASES
    say(f"{shape.layers} of {QWEN3_VL_8B.layers} layers of Qwen3-VL-8B" if not options.rehearse else "a tiny model")
    results: dict[str, Any] = {"model": asdict(shape), "attention": options.attention}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape, 128 * 64 * PIXELS_PER_TOKEN_SIDE**2, max_len)
        # Entries of the pictures of all cases, and as much again for embeddings and what is evicted late.
        num_tokens = sum(case.num_image_tokens for case in cases) + 1000
        host_gib = max(0.1, 2 * shape.kv_nbytes(num_tokens) / 2**30)
        llm = start(Path(folder), options.attention, max_len, host_gib)
        say("the engine is up")
        try:
            results["parity"] = check_parity(llm)
            results["ttft"] = measure_ttft(llm, cases, 2 if options.rehearse else 5)
        except VariantError as error:
            results["error"] = str(error)
            print(f"FAILED: {error}")
        if options.results:
            write_json(options.results, results)
    print(json.dumps(results["parity"], indent=2), flush=True)
    sys.stdout.flush()
    # vLLM's own end takes seconds and proves nothing here.
    os._exit(0 if results["parity"]["is_right"] and "error" not in results else 1)


if __name__ == "__main__":
    main()
