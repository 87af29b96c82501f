"""Reuse end to end in the real engine on this machine's GPU: that it is right, and the time to the first token.

    python tests/bench/gpu_engine.py [--model 8b|tiny] [--runner v1|v2] [--eager] [--attention NAME] [--no-ttft]
                                     [--turn FILE] [--results FILE]

"8b" has the shapes of Qwen3-VL-8B (fewer layers where memory asks for that, said in the output) but a small vocabulary;
both models have random weights that make context, positions and images matter. The engine runs in this process, and as
`vllm serve` would run it unless options say otherwise: compiled, with CUDA graphs and asynchronous scheduling.

1. Recomputing all tokens of known images (ratio 1.0) must agree with plain vLLM. The yardstick is the engine's own
   noise: how far log-probabilities move when plain vLLM serves a prompt computed and from its prefix cache.
2. `bench_ttft.py`'s comparison for prompts of 2k, 8k and 20k image tokens ("tiny": up to 2k), begun when nobody else
   holds the lock of the file that `--turn` names: others may measure as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it would be compiled first

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.bench_ttft import learn, repeat_once
from bench.engine import Engine, VariantError
from bench.gpu_model import (
    KV_CACHE_PROMPTS,
    PIXELS_PER_TOKEN_SIDE,
    QWEN3_VL_8B,
    TINY,
    Shape,
    fitting,
    register_random_weights,
    write_model,
)
from bench.gpu_turn import turn
from bench.results import say, write_json
from bench.ttft_report import Case, print_results, report_json
from e2e.engine import CONNECTOR, Answer, Ask, Picture, answer_of, request_of

RESOLUTION = 2.0**-4  # two logits between 4 and 8, in bfloat16, each off by a unit in the last place
OPENING, CLOSING = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def start(folder: Path, options: argparse.Namespace, shape: Shape, max_len: int, host_gib: float) -> Any:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = {"v1": "0", "v2": "1"}[options.runner]
    from vllm import LLM

    register_random_weights("vlcache_random")
    extra = {"host_gib": host_gib, "attention": options.attention}
    asked: dict[str, Any] = {"enforce_eager": True, "async_scheduling": False} if options.eager else {}
    if torch.cuda.is_available():  # said in bytes, since engines start side by side here
        asked |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": shape.kv_nbytes(KV_CACHE_PROMPTS * max_len)}
    return LLM(
        str(folder),
        load_format="vlcache_random",
        max_model_len=max_len,
        max_num_seqs=4,
        max_num_batched_tokens=min(8192, max_len),
        limit_mm_per_prompt={"image": 4, "video": 0},
        skip_mm_profiling=True,
        enable_mm_processor_stats=True,
        disable_log_stats=False,
        kv_transfer_config=CONNECTOR | {"kv_connector_extra_config": extra},
        **asked,
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
    pictures = [Picture(1, 512, 512), Picture(2, 512, 320)]
    for picture in pictures:
        answer_alone(llm, Ask([OPENING, "first seen here ", picture, CLOSING]))
    noise = 0.0
    for length in range(0, 32, 4):
        ask = Ask([OPENING, *pictures, " x" * length, CLOSING], "off")
        noise = max(noise, answer_alone(llm, ask).gap(answer_alone(llm, ask, is_fresh=False)))
    scene = [OPENING, "look at these: ", pictures[1], " and ", pictures[0], "what differs?", CLOSING]
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


@dataclass(frozen=True, slots=True)
class Model:
    shape: Shape
    max_len: int
    cases: tuple[Case, ...]
    repeats: int


BIG = case_of("2k", (64, 32)), case_of("8k", (128, 64)), case_of("20k", (128, 64), (128, 64), (64, 64))
SMALL = case_of("2k", (64, 32)), case_of("2 x 1k", (32, 32), (32, 32))
MODELS = {"8b": Model(QWEN3_VL_8B, 24576, BIG, 4), "tiny": Model(TINY, 4096, SMALL, 2)}


def measure_ttft(llm: Any, cases: Sequence[Case], repeats: int) -> list[dict[str, Any]]:
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v2", help="vLLM's model runner")
    parser.add_argument("--eager", action="store_true", help="neither compiled nor scheduled ahead")
    parser.add_argument("--attention", default="auto", help="of recompute passes")
    parser.add_argument("--no-ttft", action="store_true", help="only see whether it is right")
    parser.add_argument("--turn", type=Path, help="a file to lock for measuring times")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    model = MODELS[options.model]
    shape = fitting(model.shape, model.max_len) if torch.cuda.is_available() else model.shape
    say(f"{options.model}, {shape.layers} of {model.shape.layers} layers, runner {options.runner}")
    asked = {name: str(value) for name, value in vars(options).items() if name not in ("turn", "results")}
    results: dict[str, Any] = {"options": asked, "model": asdict(shape)}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape, 128 * 64 * PIXELS_PER_TOKEN_SIDE**2, model.max_len)
        # Entries of the pictures of all cases, and as much again for embeddings and what is evicted late.
        num_tokens = sum(case.num_image_tokens for case in model.cases) + 1000
        llm = start(Path(folder), options, shape, model.max_len, max(0.1, 2 * shape.kv_nbytes(num_tokens) / 2**30))
        say("the engine is up")
        results["parity"] = check_parity(llm)
        if options.results:
            write_json(options.results, results)
        try:
            if not options.no_ttft:
                with turn(options.turn):
                    results["ttft"] = measure_ttft(llm, model.cases, model.repeats)
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
