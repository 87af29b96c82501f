"""Asks vLLM questions about new pictures and compares its answers with the truth and with transformers.

cd examples && python -m grid_model.ask_vllm CHECKPOINT --questions 24
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from grid_model.chat import chat_of, pictures_of, with_urls
from grid_model.scenes import Question, Scene, ask, new_scene

KINDS: list[tuple[dict[str, int], dict[str, float]]] = [
    ({}, {"at": 1.0, "where": 1.0, "count": 1.0}),
    ({"filler": 50}, {"at": 1.0, "where": 1.0}),
    ({"legend": 4}, {"at": 1.0}),
    ({"pictures": 2}, {"at": 1.0, "where": 1.0, "which": 1.0, "hop": 1.0}),
]


def cases(number: int) -> list[tuple[str, Scene, Question]]:
    """Three questions about each scene, the kinds in turn."""
    random, found = np.random.default_rng(2**33), list[tuple[str, Scene, Question]]()
    while len(found) < number:
        shape, tasks = KINDS[len(found) // 3 % len(KINDS)]
        scene = new_scene(random, **shape)
        name = ", ".join(f"{value} {key}" for key, value in shape.items()) or "one picture"
        found += [(f"{name}: {question.task}", scene, question) for question in ask(scene, random, tasks, 3)]
    return found[:number]


@torch.no_grad()
def transformers_logits(folder: Path, asked: list[tuple[str, Scene, Question]]) -> list[torch.Tensor]:
    """Of the first answer token."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    logits = []
    for _, scene, question in asked:
        text = processor.apply_chat_template(chat_of(scene, question), tokenize=False)
        inputs = processor(text=[text], images=pictures_of(scene), return_tensors="pt")
        logits.append(model(**inputs).logits[0, -1])
    return logits


def vllm_outputs(folder: Path, asked: list[tuple[str, Scene, Question]]) -> list[Any]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=8,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 4, "video": 0},
    )
    chats = [with_urls(chat_of(scene, question), pictures_of(scene)) for _, scene, question in asked]
    outputs = engine.chat(chats, SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=24)
    options = parser.parse_args()
    asked = cases(options.questions)
    tokens = [int(row.argmax()) for row in transformers_logits(options.checkpoint, asked)]
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for (name, _, question), token, output in zip(asked, tokens, vllm_outputs(options.checkpoint, asked), strict=True):
        right, same = output.text.split() == question.answer, output.token_ids[0] == token
        tally[name] = [a + b for a, b in zip(tally[name], (1, right, same), strict=True)]
    for name, (number, right, same) in sorted(tally.items()):
        print(f"{name}: {number} asked, {right} right, {same} as transformers")


if __name__ == "__main__":
    main()
