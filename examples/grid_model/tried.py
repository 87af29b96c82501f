"""Which tokens to recompute, and what to do with the others: what was tried, on new scenes.

cd examples && python -m grid_model.tried grid_model/model --scenes 40 --json tried.json

Every picture was seen alone before, behind nothing but what the chat template writes.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from grid_model.cases import KINDS, cases
from grid_model.choices import METHODS
from grid_model.reuse import load
from grid_model.tally import Tally, lines


def compare(
    folder: Path, kinds: list[str], methods: list[str], ratios: list[float], scenes: int, questions: int
) -> dict[str, dict[str, Any]]:
    """Results by method (with its ratio) and kind; see `Tally.result`."""
    model = load(folder)
    runs = {f"{name}, {ratio:.0%}": (name, ratio) for ratio in ratios for name in methods if name != "none"}
    runs = {"none": ("none", 0.0)} | runs
    results: dict[str, dict[str, Any]] = defaultdict(dict)
    for kind in kinds:
        tallies: dict[str, Tally] = defaultdict(Tally)
        for case in cases(model, kind, scenes, questions):
            tallies["exact"].add(case.expected, case.expected)
            for title, (name, ratio) in runs.items():
                tallies[title].add(case.expected, METHODS[name].answers(model, case, ratio))
        for title, tally in tallies.items():
            results[title][kind] = tally.result()
        print(f"{kind}: {scenes} scenes, {scenes * questions} questions", flush=True)
    return dict(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scenes", type=int, default=40, help="of each kind")
    parser.add_argument("--questions", type=int, default=24, help="about each scene")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.02, 0.03, 0.05], metavar="RATIO")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = compare(
        options.checkpoint, options.kinds, options.methods, options.ratios, options.scenes, options.questions
    )
    for value, digits in (("right", 2), ("kl", 3)):
        print(f"\n{value}:\n", *lines(results, value, digits), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
