"""Accuracy of a training state on new pictures, with 95 % Wilson intervals: every cell and token there, full prefixes.

    cd examples && python -m grid_model.evaluate RUN/state.safetensors --scenes 8

Runs the plain PyTorch model; `export.py` writes the same function as a checkpoint (see README.md).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from grid_model.batches import Kind, new_batch
from grid_model.encoder import feature_table
from grid_model.model import Encoder, Language
from grid_model.run_state import load_state
from grid_model.scenes import MULTIPLE, SINGLE
from grid_model.train import correct_by_task, logits_of
from grid_model.words import VOCAB_SIZE

FULL = Kind(SINGLE, shown=64, dense=4)
KINDS = {
    "one picture": FULL,
    "one picture, 50 words before": replace(FULL, filler=50),
    "one picture, 500 words before": replace(FULL, filler=500),
    "legend of 4": replace(FULL, tasks={"at": 1.0}, legend=4),
    "legend of 4 that only the picture sees": replace(FULL, tasks={"at": 1.0}, legend=4, blind=True),
    "legend of 4, 50 words before": replace(FULL, tasks={"at": 1.0}, legend=4, filler=50),
    "two pictures": replace(FULL, tasks=MULTIPLE, pictures=2),
    "three pictures": replace(FULL, tasks=MULTIPLE, pictures=3),
    "four pictures": replace(FULL, tasks=MULTIPLE, pictures=4),
    "two pictures, 500 words before": replace(FULL, tasks=MULTIPLE, pictures=2, filler=500),
    "two pictures, legend of 4": replace(FULL, tasks={"at": 1.0, "hop": 1.0}, pictures=2, legend=4),
}


def wilson(good: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share = good / asked
    centre = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * (share * (1 - share) / asked + z * z / (4 * asked * asked)) ** 0.5
    return centre - half, centre + half


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("--scenes", type=int, default=8, help="of each kind")
    parser.add_argument("--questions", type=int, default=48, help="about each scene")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    state = load_state(options.state)
    language, encoder = Language(VOCAB_SIZE), Encoder()
    language.load_state_dict(state["language"])
    encoder.load_state_dict(state["encoder"])
    tables, report = feature_table(encoder), {}
    print(f"step {state['step']}, {state['seconds']:.0f} s of training")
    for row, (name, kind) in enumerate(KINDS.items()):
        tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for scene in range(options.scenes):
            batch = new_batch(kind, 1, options.questions, np.random.default_rng([2**32, row, scene]))
            for task, counts in correct_by_task(*logits_of(language, tables, batch), batch).items():
                tally[task] = [a + b for a, b in zip(tally[task], counts, strict=True)]
        for task, (good, asked) in sorted(tally.items()):
            low, high = wilson(good, asked)
            report[f"{name}: {task}"] = {"right": good, "asked": asked, "low": low, "high": high}
            print(f"| {name} | {task} | {good / asked:.3f} | {low:.3f}-{high:.3f} | {asked} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
