"""Do requests that decode go on evenly while long prompts are reused?

    make bench-decode       (or: python tests/bench/bench_decode.py [--quick] [--repeats N])

One engine with the connector, in this process, stepped by hand. Some requests decode all the time; meanwhile prompts of
about 20k image tokens arrive, one after the other, each once under plain chunked prefill (mode "exact": the encoder's
output comes from the store, so that no encoder run disturbs the comparison) and once with reuse. Compared are the times
between two tokens of the decoding requests, within each repeat.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import photos
from bench.results import OUT, ROOT, circumstances, say, shown, table, warn_when_busy, write_json
from checkpoints import cached_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

MODEL = {"hidden": 512, "layers": 8, "vision_hidden": 128, "vision_depth": 2, "max_pixels": 6_500_000}
NUM_DECODING = 4
SIZE = (96, 72)  # of a picture, in tokens
PICTURES = ("china", "flower", "hopper")
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
VARIANTS = {
    "plain": {"mode": "exact"},
    "reuse 5 %": {"mode": "reuse", "recompute_ratio": 0.05},
    "reuse 2 %": {"mode": "reuse", "recompute_ratio": 0.02},
}


def start(num_pictures: int) -> Any:
    from vllm import LLM

    checkpoint = cached_checkpoint("qwen2_5_vl", root=ROOT / ".checkpoints", **MODEL)
    return LLM(
        str(checkpoint),
        max_model_len=32768,
        max_num_batched_tokens=2048,
        max_num_seqs=8,
        enforce_eager=True,
        skip_mm_profiling=True,
        mm_processor_cache_gb=4,
        limit_mm_per_prompt={"image": num_pictures, "video": 0},
        hf_overrides={"vision_config": {"fullatt_block_indexes": [1]}},
        kv_transfer_config={
            "kv_connector": "VLCacheConnector",
            "kv_connector_module_path": "vlcache_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"host_gib": 2},
        },
    )


class Traffic:
    """Decoding requests, and long prompts beside them."""

    def __init__(self, llm: Any, images: list[Any]) -> None:
        self._engine = llm.llm_engine
        self._llm = llm
        self._images = images
        self._number = 0

    def add(self, text: str, images: list[Any], max_tokens: int, vlcache: dict[str, Any]) -> str:
        from vllm import SamplingParams

        self._number += 1
        extra = {"kv_transfer_params": {"vlcache": vlcache}}
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=extra)
        prompt: dict[str, Any] = {"prompt": text}
        if images:
            prompt["multi_modal_data"] = {"image": images}
        request_id = f"request-{self._number}"
        self._engine.add_request(request_id, prompt, sampling)
        return request_id

    def long_prompt(self, vlcache: dict[str, Any]) -> str:
        pictures = "and".join([PLACEHOLDER] * len(self._images))
        text = f"<|im_start|>user\nNumber {self._number}: {pictures}What?<|im_end|>\n<|im_start|>assistant\n"
        return self.add(text, self._images, 1, vlcache)

    def learn(self) -> None:
        for image in self._images:
            self.add(f"<|im_start|>user\n{PLACEHOLDER}", [image], 1, {"mode": "exact"})
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def between_tokens(self, vlcache: dict[str, Any], num_prompts: int) -> tuple[list[float], list[float], list[Any]]:
        """Seconds between tokens of a decoding request while long prompts run, their times to first token, and their
        reports.
        """
        assert self._llm.reset_prefix_cache()
        decoding = [self.add(f"Tell story {i}.", [], 4096, {"mode": "off"}) for i in range(NUM_DECODING)]
        for _ in range(8):
            self._engine.step()
        gaps, firsts, reports = [], [], []
        for _ in range(num_prompts):
            waiting = self.long_prompt(vlcache)
            started = last = time.perf_counter()
            is_done = False
            while not is_done:
                outputs = {output.request_id: output for output in self._engine.step()}
                now = time.perf_counter()
                if decoding[0] in outputs:
                    gaps.append(now - last)
                    last = now
                if waiting in outputs:
                    is_done = True
                    firsts.append(now - started)
                    reports.append(outputs[waiting].kv_transfer_params["vlcache"])
        self._engine.abort_request(decoding)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return gaps, firsts, reports


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def measure(traffic: Traffic, repeats: int, num_prompts: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats):
        for name, vlcache in VARIANTS.items():
            gaps, firsts, reports = traffic.between_tokens(vlcache, num_prompts)
            is_reuse = vlcache["mode"] == "reuse"
            assert all((report["reused_tokens"] > 0) == is_reuse for report in reports), reports
            found[name].append(
                {
                    "p50_s": statistics.median(gaps),
                    "p99_s": p99(gaps),
                    "max_s": max(gaps),
                    "num_gaps": len(gaps),
                    "first_token_s": statistics.median(firsts),
                }
            )
            say(f"repeat {repeat + 1}, {name}: {found[name][-1]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one picture, one repeat")
    options = parser.parse_args()
    warn_when_busy()
    names = PICTURES[:1] if options.quick else PICTURES
    images = [photos.of_tokens(name, *SIZE) for name in names]
    traffic = Traffic(start(len(images)), images)
    traffic.learn()
    traffic.between_tokens(VARIANTS["reuse 5 %"], 1)  # the first pass warms up
    found = measure(traffic, 1 if options.quick else options.repeats, 2)

    rows = []
    ratios: dict[str, dict[str, float]] = {}
    for name in list(VARIANTS)[1:]:
        ratios[name] = {
            key: statistics.median(
                ours[key] / plain[key] for ours, plain in zip(found[name], found["plain"], strict=True)
            )
            for key in ("p50_s", "p99_s", "max_s", "first_token_s")
        }
        rows.append([name, *(f"{value:.2f}" for value in ratios[name].values())])
    header = ["over plain chunked prefill", "median between tokens", "p99", "longest", "time to first token"]
    print(table(header, rows))
    path = OUT / "bench_decode.json"
    write_json(path, {"circumstances": circumstances(), "measured": found, "ratios": ratios})
    say(f"written to {shown(path)}")


if __name__ == "__main__":
    main()
