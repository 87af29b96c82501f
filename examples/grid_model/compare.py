"""How answers change when pictures are reused: plain vLLM beside reuse at several ratios, on new scenes.

cd examples && python -m grid_model.compare grid_model/model --questions 48

Every picture is shown alone first, so what is reused was computed without legend, number or other pictures before it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from grid_model.chat import chat_of, pictures_of, with_urls
from grid_model.scenes import Question, Scene, ask, new_scene

KINDS: dict[str, tuple[dict[str, int], dict[str, float]]] = {
    "one picture": ({}, {"at": 1.0, "where": 1.0}),
    "50 words before": ({"filler": 50}, {"at": 1.0, "where": 1.0}),
    "count": ({}, {"count": 1.0}),
    "legend": ({"legend": 4}, {"at": 1.0}),
    "two pictures": ({"pictures": 2}, {"at": 1.0, "where": 1.0, "which": 1.0}),
    "hop": ({"pictures": 2}, {"hop": 1.0}),
}
RATIOS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BATCH = 8
CONNECTOR = {
    "kv_connector": "VLCacheConnector",
    "kv_connector_module_path": "vlcache_connector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"host_gib": 2},
}


def engine(folder: Path) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM

    return LLM(
        model=str(folder),
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=BATCH,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 4, "video": 0},
        kv_transfer_config=CONNECTOR,
    )


def answers(llm: Any, cases: list[tuple[Scene, Question]], options: dict[str, Any]) -> list[str]:
    """Texts, from an empty prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=4, extra_args={"kv_transfer_params": {"vlcache": options}})
    chats = [with_urls(chat_of(scene, question), pictures_of(scene)) for scene, question in cases]
    llm.reset_prefix_cache()
    batches = [chats[first : first + BATCH] for first in range(0, len(chats), BATCH)]
    outputs = [output for batch in batches for output in llm.chat(batch, sampling, use_tqdm=False)]
    return [output.outputs[0].text for output in outputs]


def show(llm: Any, cases: list[tuple[Scene, Question]]) -> None:
    """Each picture of these scenes alone."""
    scenes = [Scene(scene.pictures[i : i + 1]) for scene, _ in cases for i in range(len(scene.pictures))]
    answers(llm, [(scene, Question("at", ["colour", "at", "c5"], [])) for scene in scenes], {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=48, help="of each kind")
    options = parser.parse_args()
    llm, random = engine(options.checkpoint), np.random.default_rng(2**34)
    modes: dict[str, dict[str, Any]] = {"plain": {"mode": "off"}}
    modes |= {f"{ratio:.0%}": {"recompute_ratio": ratio} for ratio in RATIOS}
    print(f"{'right answers':16}" + "".join(f"{name:>7}" for name in modes))
    for kind, (shape, tasks) in KINDS.items():
        cases: list[tuple[Scene, Question]] = []
        while len(cases) < options.questions:
            scene = new_scene(random, **shape)
            cases += [(scene, question) for question in ask(scene, random, tasks, 2)]
        show(llm, cases)
        shares = []
        for mode in modes.values():
            texts = answers(llm, cases, mode)
            right = [text.split() == question.answer for text, (_, question) in zip(texts, cases, strict=True)]
            shares.append(sum(right) / len(right))
        print(f"{kind:16}" + "".join(f"{share:7.2f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
