"""The question of `contexts.py` on the real engine: pictures are first seen in one context or another, and come back.

cd examples && python -m grid_model.contexts_vllm grid_model/model --questions 24

Only requests that did reuse count; the engine declines reuse that would not pay, which pictures as small as these may
not (then "-"). With `--alone` the engine runs with entry_context = "alone": whatever a picture was seen behind, its
entry is computed behind its start token when the engine is idle.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from grid_model.cases import KINDS
from grid_model.chat import chat_of, pictures_of, with_urls
from grid_model.scenes import Question, Scene, ask, new_scene

IDLE_S = 20.0
ANY = Question("at", ["colour", "at", "c5"], [])
SEEN: dict[str, Callable[[np.ndarray, Generator], Scene]] = {
    "the chat template": lambda picture, random: Scene(picture[None]),
    "a legend": lambda picture, random: Scene(picture[None], legend=new_scene(random, legend=4).legend),
    "1-3 other pictures": lambda picture, random: Scene(
        np.concatenate([new_scene(random, pictures=int(random.integers(1, 4))).pictures, picture[None]])
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "leading 5%": {"policy": "leading", "recompute_ratio": 0.05},
    "shifted 5%": {"policy": "shifted", "recompute_ratio": 0.05},
}


def engine(folder: Path, options: dict[str, Any]) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM

    return LLM(
        model=str(folder),
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=8,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 4, "video": 0},
        kv_transfer_config={
            "kv_connector": "VLCacheConnector",
            "kv_connector_module_path": "vlcache_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"host_gib": 2} | options,
        },
    )


def answers(llm: Any, cases: list[tuple[Scene, Question]], options: dict[str, Any]) -> list[tuple[str, int]]:
    """Texts and numbers of reused tokens, from an empty prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=4, extra_args={"kv_transfer_params": {"vlcache": options}})
    chats = [with_urls(chat_of(scene, question), pictures_of(scene)) for scene, question in cases]
    found = []
    for first in range(0, len(chats), 8):
        llm.reset_prefix_cache()
        for output in llm.chat(chats[first : first + 8], sampling, use_tqdm=False):
            report = (output.kv_transfer_params or {}).get("vlcache", {})
            found.append((output.outputs[0].text, report.get("reused_tokens", 0)))
    return found


def share(llm: Any, cases: list[tuple[Scene, Question]], options: dict[str, Any]) -> str:
    """Of right answers, among those that reused."""
    found = zip(answers(llm, cases, options), cases, strict=True)
    right = [text.split() == q.answer for (text, reused), (_, q) in found if reused or options.get("mode") == "off"]
    return f"{sum(right) / len(right):.2f} of {len(right)}" if right else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=24, help="of each kind")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    options = parser.parse_args()
    llm = engine(options.checkpoint, {"entry_context": "alone"} if options.alone else {})
    print(f"{'right answers':22}{'seen behind':20}{'plain':>12}" + "".join(f"{name:>12}" for name in MODES))
    for kind in options.kinds:
        shape, tasks = KINDS[kind]
        random, cases = np.random.default_rng([2**36, list(KINDS).index(kind)]), list[tuple[Scene, Question]]()
        while len(cases) < options.questions:
            scene = new_scene(random, **shape)
            cases += [(scene, question) for question in ask(scene, random, tasks, 4)]
        plain = share(llm, cases, {"mode": "off"})
        for context, seen in SEEN.items():
            llm.reset_prefix_cache(reset_connector=True)  # nothing is known any more
            shown = [seen(picture, random) for scene, _ in cases[::4] for picture in scene.pictures]
            answers(llm, [(scene, ANY) for scene in shown], {})
            time.sleep(IDLE_S if options.alone else 0.0)
            shares = [share(llm, cases, mode) for mode in MODES.values()]
            print(f"{kind:22}{context:20}{plain:>12}" + "".join(f"{s:>12}" for s in shares), flush=True)


if __name__ == "__main__":
    main()
