"""Reuse in one process: the same pictures under new text and in another order, beside plain vLLM.

    python examples/offline.py
    python examples/offline.py --model Qwen/Qwen3-VL-2B-Instruct --picture cat.jpg --picture dog.jpg

Without arguments it takes the small model of this repository and pictures that this model can read. That model is so
small that there is hardly any time to save: what it shows is which tokens are reused and that its answers stay right.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from grid_model.chat import pictures_of, url_of
from grid_model.scenes import new_scene
from PIL import Image
from savings import Answer, Savings

GRID_MODEL = Path(__file__).parent / "grid_model" / "model"
GRID_QUESTIONS = ("colour at c5", "shape at d2")
QUESTIONS = ("What does this picture show?", "Which colour stands out?")

Message = dict[str, Any]


def start(model: str, **options: Any) -> Any:
    """vLLM with the connector. `options` are the connector's."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB, without a GPU
    from vllm import LLM

    return LLM(
        model,
        max_model_len=8192,
        limit_mm_per_prompt={"image": 4, "video": 0},
        enforce_eager=True,  # starts sooner; leave it out where speed matters
        kv_transfer_config={
            "kv_connector": "VLCacheConnector",
            "kv_connector_module_path": "vlcache_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"host_gib": 2} | options,
        },
    )


def ask(llm: Any, messages: list[Message], **wishes: Any) -> Answer:
    """One request; `wishes` are its `kv_transfer_params["vlcache"]`.

    Before it, vLLM's own caches are emptied, so that only the connector's entries are left: as if much else had been
    asked in between.
    """
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
    params = {"vlcache": {"explain": True} | wishes}
    sampling = SamplingParams(temperature=0.0, max_tokens=8, extra_args={"kv_transfer_params": params})
    start_s = time.perf_counter()
    (output,) = llm.chat(messages, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start_s
    return Answer(output.outputs[0].text.strip(), seconds, output.kv_transfer_params["vlcache"])


def message(*parts: str | Image.Image) -> Message:
    """Of the user: text and pictures in this order."""
    return {
        "role": "user",
        "content": [{"type": "text", "text": p} if isinstance(p, str) else url_of(p) for p in parts],
    }


def grid_pictures(number: int) -> list[Image.Image]:
    """Pictures that the grid model can read; always the same."""
    random = np.random.default_rng(7)
    return [picture for _ in range(number) for picture in pictures_of(new_scene(random))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(GRID_MODEL), help="Qwen2.5-VL or Qwen3-VL, a folder or a name")
    parser.add_argument("--picture", action="append", help="a file; give it twice or more for several")
    options = parser.parse_args()
    pictures = [Image.open(path).convert("RGB") for path in options.picture or []] or grid_pictures(2)
    first, second = QUESTIONS if options.picture else GRID_QUESTIONS
    a, b = pictures[0], pictures[-1]

    llm = start(options.model)
    for picture in pictures:  # seen once, each alone: now their KV and encoder outputs are stored
        ask(llm, [message(picture, first)])
    prompts = {
        "another question": [message(a, second)],
        "text before the picture": [message("we opened the letter in the morning", b, second)],
        "both, in another order": [message("picture-1", b, "picture-2", a, f"picture-2 {first}")],
    }
    savings = Savings()
    for title, messages in prompts.items():
        plain = ask(llm, messages, mode="off")
        savings.show(title, ask(llm, messages), plain)
    return savings.close()


if __name__ == "__main__":
    sys.exit(main())
