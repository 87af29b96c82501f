"""Scenes and questions: pictures as arrays of cell contents, the text before them, and questions with their answers.

Everything here is words; the trainer turns them into token ids, the evaluation into chat messages with real pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator

from grid_model.pictures import CELLS, NUM_CONTENTS, content_of
from grid_model.words import COLOURS, COLUMNS, FILLER, NAMES, NUMBERED, ROWS, SHAPES

EMPTY_SHARE = 0.2


@dataclass(frozen=True)
class Question:
    task: str
    words: list[str]
    answer: list[str]


@dataclass
class Scene:
    """`pictures`: (number of pictures, 8, 8) cell contents; -1 marks a cell that is not shown (only in training)."""

    pictures: np.ndarray
    filler: list[str] = field(default_factory=list)
    legend: dict[str, str] = field(default_factory=dict)

    def opening(self) -> list[str]:
        """The words before the first picture."""
        return self.filler + [word for old, new in self.legend.items() for word in (old, "is", new, ",")]

    def before_picture(self, index: int) -> list[str]:
        return [NUMBERED[index]] if len(self.pictures) > 1 else []

    def named(self, word: str) -> list[str]:
        return [self.legend.get(word, word)]

    def look(self, picture: int, row: int, column: int, of: str) -> list[str]:
        """The answer word for the colour or shape of a cell."""
        content = int(self.pictures[picture, row, column])
        if content == 0:
            return ["none"]
        colour, shape = divmod(content - 1, len(SHAPES))
        return self.named(COLOURS[colour] if of == "colour" else SHAPES[shape])


def new_scene(
    random: Generator, *, pictures: int = 1, shown: int = 64, filler: int = 0, legend: int = 0, palette: int = 64
) -> Scene:
    """`shown` cells of each picture have content (or are seen to be empty), the others do not exist.

    palette: how many different glyphs there are, so that few cells may hold one of them several times.
    """
    glyphs = 1 + random.permutation(NUM_CONTENTS - 1)[:palette]
    contents = random.choice(glyphs, (pictures, CELLS * CELLS))
    contents[random.random(contents.shape) < EMPTY_SHARE] = 0
    hidden = np.argsort(random.random(contents.shape), axis=1)[:, shown:]
    np.put_along_axis(contents, hidden, -1, axis=1)
    old = random.permutation(COLOURS)[:legend].tolist()
    names = random.permutation(NAMES)[:legend].tolist()
    return Scene(
        contents.reshape(pictures, CELLS, CELLS),
        random.choice(FILLER, filler).tolist(),
        dict(zip(old, names, strict=True)),
    )


def thing(content: int) -> list[str]:
    colour, shape = divmod(content - 1, len(SHAPES))
    return [f"{COLOURS[colour]}-{SHAPES[shape]}"]


def pick(random: Generator, cells: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in cells[random.integers(len(cells))])


def at(scene: Scene, random: Generator) -> Question:
    """What is at a cell; where a legend exists, mostly cells that it renames."""
    cells = np.argwhere(scene.pictures >= 0)
    picture, row, column = pick(random, cells)
    of = ("colour", "shape")[random.integers(2)]
    for _ in range(4 if scene.legend else 0):
        if scene.look(picture, row, column, of)[0] in scene.legend.values():
            break
        of = ("colour", "shape")[random.integers(2)]
        picture, row, column = pick(random, cells)
    words = [*scene.before_picture(picture), of, "at", COLUMNS[column] + ROWS[row]]
    return Question(f"at {of}", words, scene.look(picture, row, column, of))


def unique_cells(scene: Scene, picture: int) -> np.ndarray:
    """Cells (n, 2) of this picture whose content occurs once in it."""
    contents = scene.pictures[picture]
    counts = np.bincount(contents[contents > 0], minlength=NUM_CONTENTS)
    return np.argwhere((contents > 0) & (counts[np.maximum(contents, 0)] == 1))


def where(scene: Scene, random: Generator) -> Question | None:
    picture = int(random.integers(len(scene.pictures)))
    cells = unique_cells(scene, picture)
    if not len(cells):
        return None
    row, column = pick(random, cells)
    words = [*scene.before_picture(picture), "where", "is", *thing(int(scene.pictures[picture, row, column]))]
    return Question("where", words, [COLUMNS[column] + ROWS[row]])


def count(scene: Scene, random: Generator) -> Question:
    """How often a glyph occurs; three of four questions ask for one that is there."""
    picture = int(random.integers(len(scene.pictures)))
    contents = scene.pictures[picture]
    there = contents[contents > 0]
    content = content_of(int(random.integers(len(COLOURS))), int(random.integers(len(SHAPES))))
    if len(there) and random.random() < 0.75:
        content = int(random.choice(there))
    return Question(
        "count",
        [*scene.before_picture(picture), "how", "many", *thing(content)],
        [str(min(int((there == content).sum()), 9))],
    )


def which(scene: Scene, random: Generator) -> Question | None:
    """The picture that has a glyph which no other picture has."""
    picture = int(random.integers(len(scene.pictures)))
    others = set(np.delete(scene.pictures, picture, axis=0).ravel().tolist())
    own = sorted(set(scene.pictures[picture].ravel().tolist()) - others - {0, -1})
    if not own:
        return None
    return Question("which", ["which", "has", *thing(int(random.choice(own)))], [NUMBERED[picture]])


def hop(scene: Scene, random: Generator) -> Question | None:
    """Where a picture has a glyph, and the colour or shape of that place in another picture."""
    first, second = (int(i) for i in random.permutation(len(scene.pictures))[:2])
    cells = np.array([c for c in unique_cells(scene, first) if scene.pictures[second, c[0], c[1]] >= 0])
    if not len(cells):
        return None
    row, column = pick(random, cells)
    of = ("colour", "shape")[random.integers(2)]
    words = [NUMBERED[first], NUMBERED[second], of, *thing(int(scene.pictures[first, row, column]))]
    return Question("hop", words, [COLUMNS[column] + ROWS[row], *scene.look(second, row, column, of)])


ASK: dict[str, Callable[[Scene, Generator], Question | None]] = {
    "at": at,
    "where": where,
    "count": count,
    "which": which,
    "hop": hop,
}


def ask(scene: Scene, random: Generator, tasks: dict[str, float], number: int) -> list[Question]:
    """`number` questions, the tasks drawn by weight; a task that this scene does not allow becomes `at`."""
    names = random.choice(list(tasks), number, p=np.array(list(tasks.values())) / sum(tasks.values()))
    return [ASK[name](scene, random) or at(scene, random) for name in names]


SINGLE = {"at": 2.0, "where": 1.0, "count": 1.0}
MULTIPLE = {"at": 2.0, "where": 1.0, "count": 1.0, "which": 1.0, "hop": 2.0}
