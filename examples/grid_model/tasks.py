"""Writes questions about new pictures for `vlcache eval`: PNG files and tasks.jsonl.

cd examples && python -m grid_model.tasks FOLDER --questions 48
vlcache eval grid_model/model FOLDER/tasks.jsonl --engine '{"max_model_len": 4096, "enforce_eager": true}'
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grid_model.chat import chat_of, pictures_of
from grid_model.scenes import ask, new_scene

SEED = 2**34  # not one that training draws from
QUESTIONS_PER_SCENE = 2
TASKS: dict[str, tuple[dict[str, int], dict[str, float]]] = {
    "one picture": ({}, {"at": 1.0, "where": 1.0}),
    "50 words before": ({"filler": 50}, {"at": 1.0, "where": 1.0}),
    "500 words before": ({"filler": 500}, {"at": 1.0, "where": 1.0}),
    "count": ({}, {"count": 1.0}),
    "legend": ({"legend": 4}, {"at": 1.0}),
    "two pictures": ({"pictures": 2}, {"at": 1.0, "where": 1.0, "which": 1.0}),
    "four pictures": ({"pictures": 4}, {"at": 1.0, "where": 1.0, "which": 1.0}),
    "hop": ({"pictures": 2}, {"hop": 1.0}),
    "two pictures, legend": ({"pictures": 2, "legend": 4}, {"at": 1.0}),
}


def write(folder: Path, questions: int, tasks: list[str], seed: int = SEED) -> Path:
    """`questions` of each task, which depend on the seed and the task alone; returns the task file."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    path = folder / "tasks.jsonl"
    with path.open("w") as file:
        for task in tasks:
            for line in _lines(folder, task, questions, seed):
                file.write(json.dumps(line) + "\n")
    return path


def _lines(folder: Path, task: str, questions: int, seed: int) -> Iterator[dict[str, Any]]:
    shape, kinds = TASKS[task]
    number = list(TASKS).index(task)
    random = np.random.default_rng([seed, number])
    for scene_number in range(-(-questions // QUESTIONS_PER_SCENE)):
        scene = new_scene(random, **shape)
        names = [f"pictures/{number}-{scene_number}-{i}.png" for i in range(len(scene.pictures))]
        for name, picture in zip(names, pictures_of(scene), strict=True):
            picture.save(folder / name)
        left = questions - scene_number * QUESTIONS_PER_SCENE
        for index, question in enumerate(ask(scene, random, kinds, min(left, QUESTIONS_PER_SCENE))):
            yield {
                "id": f"{task}/{scene_number}/{index}",
                "task": task,
                "messages": _with_paths(chat_of(scene, question), names),
                "answer": " ".join(question.answer),
            }


def _with_paths(chat: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """The chat with its pictures in place, as paths."""
    left = iter(names)
    return [
        message
        | {
            "content": [
                {"type": "image_url", "image_url": {"url": next(left)}} if part["type"] == "image" else part
                for part in message["content"]
            ]
        }
        for message in chat
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=48, help="of each task (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    options = parser.parse_args()
    print(write(options.folder, options.questions, options.tasks))


if __name__ == "__main__":
    main()
