"""Does it matter what stood before a picture when its entry was computed? Entries of several contexts, on new scenes.

cd examples && python -m grid_model.contexts grid_model/model --scenes 40 --json contexts.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from grid_model.cases import HELD_OUT, KINDS, cases
from grid_model.choices import METHODS
from grid_model.reuse import GridModel, entry, exact, load, part_of, prompt_of
from grid_model.scenes import Scene, new_scene
from grid_model.tally import Tally, lines

Compile = Callable[[GridModel, np.ndarray, Generator], Tensor]
"""The entry of a picture, (8, 8) cell contents, that was first seen in some context."""
TEMPLATE = "the chat template"
METHOD_RATIOS = (("none", 0.0), ("leading", 0.02), ("leading", 0.05), ("shifted", 0.02), ("shifted", 0.05))


def behind_words(model: GridModel, picture: np.ndarray, random: Generator) -> Tensor:
    return entry(model, Scene(picture[None], filler=new_scene(random, filler=int(random.integers(1, 60))).filler))


def behind_legend(model: GridModel, picture: np.ndarray, random: Generator) -> Tensor:
    return entry(model, Scene(picture[None], legend=new_scene(random, legend=4).legend))


def behind_pictures(model: GridModel, picture: np.ndarray, random: Generator) -> Tensor:
    """As the second to fourth of a conversation."""
    others = new_scene(random, pictures=int(random.integers(1, 4))).pictures
    return entry(model, Scene(np.concatenate([others, picture[None]])))


def behind_template(model: GridModel, picture: np.ndarray, random: Generator) -> Tensor:
    return entry(model, Scene(picture[None]))


def behind_start(model: GridModel, picture: np.ndarray, random: Generator) -> Tensor:
    """Behind the token that opens every picture, without the one that opens the prompt."""
    prompt = prompt_of(model, Scene(picture[None]))
    kept = prompt.is_image.clone()
    kept[int(prompt.spans[0, 0]) - 1] = True
    return exact(model, part_of(prompt, kept))[:, :, 1:]


def behind_nothing(model: GridModel, picture: np.ndarray, random: Generator) -> Tensor:
    prompt = prompt_of(model, Scene(picture[None]))
    return exact(model, part_of(prompt, prompt.is_image))


CONTEXTS: dict[str, Compile] = {
    "1-59 words": behind_words,
    "a legend": behind_legend,
    "1-3 other pictures": behind_pictures,
    TEMPLATE: behind_template,
    "its start token": behind_start,
    "nothing": behind_nothing,
}


def compare(folder: Path, kinds: list[str], scenes: int, questions: int) -> dict[str, dict[str, Any]]:
    """Results by method and context, and kind: those of `Tally.result`, and beside the chat template's."""
    model = load(folder)
    results: dict[str, dict[str, Any]] = defaultdict(dict)
    for kind in kinds:
        tallies: dict[str, Tally] = defaultdict(Tally)
        for number, case in enumerate(cases(model, kind, scenes, questions)):
            random = np.random.default_rng([HELD_OUT, 1, number])
            entries = {
                context: [compile_entry(model, picture, random) for picture in case.scene.pictures]
                for context, compile_entry in CONTEXTS.items()
            }
            for name, ratio in METHOD_RATIOS:
                for context in CONTEXTS:
                    given = METHODS[name].answers(model, replace(case, entries=entries[context]), ratio)
                    tallies[f"{name} {ratio:.0%}, behind {context}"].add(case.expected, given)
        for title, tally in tallies.items():
            template = tallies[f"{title.split(', ')[0]}, behind {TEMPLATE}"]
            results[title][kind] = tally.result() | tally.beside(template)
        print(f"{kind}: {scenes} scenes, {scenes * questions} questions", flush=True)
    return dict(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scenes", type=int, default=40, help="of each kind")
    parser.add_argument("--questions", type=int, default=24, help="about each scene")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = compare(options.checkpoint, list(KINDS), options.scenes, options.questions)
    for value, digits in (("right", 2), ("kl", 3), ("right_more", 3), ("kl_more", 3)):
        print(f"\n{value}:\n", *lines(results, value, digits), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
