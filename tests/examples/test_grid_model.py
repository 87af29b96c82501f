"""Pictures and questions that the grid model learns from: drawn as the processor sees them, answered as they are."""

from typing import Any

import numpy as np
import pytest
import torch
from grid_model import batches, export, model, pictures, scenes, sizes, words
from transformers import Qwen2VLImageProcessor


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(3)


def test_patches_of_the_trainer_are_bitwise_those_of_the_image_processor(random: np.random.Generator) -> None:
    contents = random.integers(0, pictures.NUM_CONTENTS, (8, 8))
    processor = Qwen2VLImageProcessor(
        patch_size=8,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 256, "longest_edge": 256 * 256},
    )
    seen = processor(images=[pictures.draw(contents)], return_tensors="pt")["pixel_values"]
    row, column = np.divmod(np.arange(256), 16)
    ours = pictures.token_patches()[contents[row // 2, column // 2], row % 2, column % 2]
    assert torch.equal(seen, torch.from_numpy(ours.reshape(1024, -1)))


def test_each_token_of_a_glyph_shows_which_glyph_it_is() -> None:
    patches = pictures.token_patches()
    for y, x in np.ndindex(2, 2):
        assert len(np.unique(patches[:, y, x].reshape(pictures.NUM_CONTENTS, -1), axis=0)) == pictures.NUM_CONTENTS


def content_of(thing: str) -> int:
    colour, shape = thing.split("-")
    return pictures.content_of(words.COLOURS.index(colour), words.SHAPES.index(shape))


def cell(question: scenes.Question) -> tuple[int, int]:
    """Row and column of a question or answer that ends in them."""
    column, row = tuple((question.words if question.task.startswith("at") else question.answer)[-1])
    return words.ROWS.index(row), words.COLUMNS.index(column)


@pytest.mark.parametrize("legend", [0, 5])
def test_answers_follow_from_the_pictures_and_the_legend(legend: int, random: np.random.Generator) -> None:
    scene = scenes.new_scene(random, pictures=3, legend=legend)
    old = {new: word for word, new in scene.legend.items()}
    for question in scenes.ask(scene, random, scenes.MULTIPLE, 200):
        asked = question.words
        if question.task in ("where", "count", "which"):
            content = content_of(asked[-1])
            places = np.argwhere(scene.pictures == content)
        if question.task == "which":
            assert {words.NUMBERED[p] for p, _, _ in places} == set(question.answer)
            continue
        picture = words.NUMBERED.index(asked[0])
        shown = scene.pictures[picture]
        if question.task == "where":
            assert [[picture, *cell(question)]] == [p for p in places.tolist() if p[0] == picture]
        elif question.task == "count":
            assert question.answer == [str((shown == content).sum())]
        elif question.task != "hop":
            content = shown[cell(question)]
            thing = scenes.thing(int(content))[0].split("-")[asked[1] == "shape"] if content else "none"
            assert not set(question.answer) & scene.legend.keys()
            assert [old.get(question.answer[0], question.answer[0])] == [thing]


def test_hops_lead_through_a_glyph_that_occurs_once(random: np.random.Generator) -> None:
    scene = scenes.new_scene(random, pictures=2)
    for question in scenes.ask(scene, random, {"hop": 1.0}, 50):
        first, second, of, thing = question.words
        content = content_of(thing)
        ((row, column),) = np.argwhere(scene.pictures[words.NUMBERED.index(first)] == content)
        place = words.COLUMNS[column] + words.ROWS[row]
        assert question.answer == [place, *scene.look(words.NUMBERED.index(second), row, column, of)]


def tokens_of(scene: scenes.Scene, question: scenes.Question) -> list[int]:
    """The prompt as the tokenizer reads it from the chat template, one placeholder for each picture."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": " ".join(scene.opening())}]
    for index in range(len(scene.pictures)):
        parts += [{"type": "text", "text": " ".join(scene.before_picture(index))}, {"type": "image"}]
    parts.append({"type": "text", "text": " ".join(question.words)})
    tokenizer = export.tokenizer()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids


@pytest.mark.parametrize("number", [1, 2])
def test_a_training_sequence_is_the_prompt_that_a_server_would_build(number: int, random: np.random.Generator) -> None:
    scene = scenes.new_scene(random, pictures=number, filler=9, legend=3)
    question = scenes.at(scene, random)
    prefix = batches.prefix_of(scene, 4, random, 0).ids
    assert prefix.count(batches.IMAGE) == 256 * number
    whole = [token for i, token in enumerate(prefix) if token != batches.IMAGE or prefix[i - 1] != batches.IMAGE]
    branch, labels = batches.branch_of(question, 12)
    asked = len(question.words)
    assert whole + branch[:asked] == tokens_of(scene, question)
    assert labels[asked - 1 : asked + 1] == [branch[asked], batches.END]


def test_a_batch_shows_the_tokens_it_was_asked_for(random: np.random.Generator) -> None:
    batch = batches.new_batch(batches.Kind(scenes.SINGLE, shown=10, dense=2, shift=40), 3, 4, random)
    assert batch.content.shape == (3, 20)
    assert (batch.place.diff(dim=1) > 0).all()
    assert ((batch.ids == batches.IMAGE).sum(1) == 20).all()
    seen = batch.at[:, batch.ids == batches.IMAGE].view(3, 3, 20)
    assert torch.equal(seen[1] - seen[0], (batch.place // 16).float())
    assert torch.equal(seen[2] - seen[0], (batch.place % 16).float())


def test_questions_of_a_blind_batch_see_all_but_the_legend(random: np.random.Generator) -> None:
    kind = batches.Kind({"at": 1.0}, shown=4, filler=3, legend=2, blind=True)
    batch = batches.new_batch(kind, 2, 4, random)
    for ids in batch.ids[:, batch.unseen].tolist():
        first, second = ids[:4], ids[4:]
        for old, is_word, new, comma in (first, second):
            assert words.WORDS[old] in words.COLOURS
            assert words.WORDS[new] in words.NAMES
            assert (words.WORDS[is_word], words.WORDS[comma]) == ("is", ",")


def test_a_palette_limits_the_glyphs_of_a_scene(random: np.random.Generator) -> None:
    scene = scenes.new_scene(random, pictures=2, palette=5)
    assert len(np.unique(scene.pictures[scene.pictures > 0])) == 5


def test_branches_attend_as_if_unseen_tokens_were_not_there() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, sizes.HEADS, 6, sizes.HEAD_DIM)  # two branches of three tokens
    k, v = torch.randn(2, 1, sizes.KV_HEADS, 9, sizes.HEAD_DIM)
    own_k, own_v = torch.randn(2, 1, sizes.KV_HEADS, 6, sizes.HEAD_DIM)
    unseen, future = torch.arange(9) // 3 == 1, torch.ones(3, 3, dtype=torch.bool).triu(1)
    masked = model.branch_attention(q, k, v, own_k, own_v, unseen, future)
    seen = k[:, :, ~unseen], v[:, :, ~unseen]
    without = model.branch_attention(q, *seen, own_k, own_v, unseen.new_zeros(6), future)
    torch.testing.assert_close(masked, without)
