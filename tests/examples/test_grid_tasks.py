"""The writer of task files: `vlcache eval` takes them, and they hold what the scenes say."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from grid_model import pictures, tasks, words
from PIL import Image

from vlcache_connector.evaluate.tasks import Question, images_of, read

QUESTIONS = 3


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    return read(tasks.write(tmp_path_factory.mktemp("tasks"), QUESTIONS, list(tasks.TASKS)))


def words_of(question: Question) -> list[str]:
    content = question.messages[0]["content"]
    return [word for part in content if part["type"] == "text" for word in part["text"].split()]


def test_each_task_has_its_number_of_questions_and_of_pictures(questions: list[Question]) -> None:
    assert [question.task for question in questions] == [task for task in tasks.TASKS for _ in range(QUESTIONS)]
    for question in questions:
        shape, _ = tasks.TASKS[question.task]
        assert question.num_images == shape.get("pictures", 1) == len(question.warm)
        assert question.is_all_warm and question.answers


def test_text_stands_before_the_picture_where_the_task_says_so(questions: list[Question]) -> None:
    lengths = {question.task: len(words_of(question)) for question in questions}
    assert lengths["one picture"] < 10 < 50 < lengths["50 words before"] < 60 < 500 < lengths["500 words before"]
    assert all("is" in words_of(question) for question in questions if "legend" in question.task)


def test_an_answer_is_what_the_picture_shows(questions: list[Question]) -> None:
    """Read back from the file: the cell that is asked for looks like the glyph of the answer."""
    (question, *_) = [q for q in questions if q.task == "one picture" and "at" in words_of(q)]
    of, _, place = words_of(question)
    with Image.open(images_of(question.messages)[0]) as image:
        pixels = np.asarray(image)
    row, column, side = int(place[1]) - 1, ord(place[0]) - ord("a"), pictures.CELL_PIXELS
    cell = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
    content = next(i for i, known in enumerate(pictures.cell_images()) if np.array_equal(known, cell))
    colour, shape = divmod(content - 1, len(words.SHAPES))
    names = {"colour": words.COLOURS[colour], "shape": words.SHAPES[shape]} if content else {of: "none"}
    assert question.answers == (names[of],)


def test_the_same_seed_gives_the_same_questions_and_another_gives_others(tmp_path: Path) -> None:
    def written(name: str, chosen: list[str], seed: int) -> dict[str, str]:
        folder = tmp_path / name
        tasks.write(folder, 1, chosen, seed)
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")
        }

    first = written("first", ["hop", "count"], 5)
    assert written("again", ["hop", "count"], 5) == first
    assert written("other", ["hop", "count"], 6).items().isdisjoint(first.items())
    alone = written("alone", ["count"], 5)
    assert {name: alone[name] for name in alone if name.endswith("png")}.items() <= first.items()
