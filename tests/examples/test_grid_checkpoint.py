"""The exported checkpoint is the model that was trained: transformers computes from it what the trainer computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid_model import batches, chat, encoder, export, model, scenes, train, words
from transformers import AutoModelForImageTextToText, AutoProcessor

ALL_BUT_SURE: list[tuple[dict[str, int], dict[str, float]]] = [
    ({}, {"at": 1.0}),
    ({}, {"where": 1.0}),
    ({"filler": 50}, {"at": 1.0, "where": 1.0}),
    ({"legend": 4}, {"at": 1.0}),
    ({"pictures": 2}, {"at": 1.0, "where": 1.0, "which": 1.0}),
]


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """Parameters that no part leaves as it is: even norms and biases differ from one and zero."""
    torch.manual_seed(4)
    language, vision = model.Language(words.VOCAB_SIZE), model.Encoder()
    with torch.no_grad():
        for parameter in [*language.parameters(), *vision.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return {"language": language.state_dict(), "encoder": vision.state_dict()}


@pytest.fixture(scope="module")
def folder(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    export.export(state, path, torch.float32)
    return path


def logits_of_the_trainer(state: dict[str, Any], scene: scenes.Scene, question: scenes.Question) -> torch.Tensor:
    language, vision = model.Language(words.VOCAB_SIZE), model.Encoder()
    language.load_state_dict(state["language"])
    vision.load_state_dict(state["encoder"])
    prefix = batches.prefix_of(scene, 4, np.random.default_rng(0), 0)
    length = len(question.words) + len(question.answer)
    branch, labels = batches.branch_of(question, length)
    batch = batches.Batch(
        ids=torch.tensor([prefix.ids]),
        content=torch.from_numpy(prefix.content)[None],
        place=torch.from_numpy(prefix.place)[None],
        at=torch.from_numpy(prefix.at)[:, None].float(),
        unseen=torch.zeros(len(prefix.ids), dtype=torch.bool),
        branches=torch.tensor([[branch]]),
        labels=torch.tensor([[labels]]),
        branch_at=torch.arange(prefix.end, prefix.end + length).float(),
        tasks=np.array([[question.task]]),
    )
    with torch.no_grad():
        logits, _ = train.logits_of(language, encoder.feature_table(vision), batch)
    return logits[0]


@pytest.mark.parametrize(("number", "legend"), [(1, 0), (1, 3), (3, 0)])
def test_transformers_computes_the_logits_of_the_trainer(
    number: int, legend: int, state: dict[str, Any], folder: Path
) -> None:
    random = np.random.default_rng(number)
    scene = scenes.new_scene(random, pictures=number, legend=legend, filler=7)
    question = scenes.at(scene, random)
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(chat.chat_of(scene, question), tokenize=False)
    inputs = processor(text=[text], images=chat.pictures_of(scene), return_tensors="pt")
    with torch.no_grad():
        seen = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)(**inputs).logits[0, -1]
    ours = logits_of_the_trainer(state, scene, question)
    assert ours.std() > 0.1
    torch.testing.assert_close(seen, ours, rtol=0.0, atol=1e-3)


def test_the_model_of_the_repository_reads_pictures_that_it_has_not_seen() -> None:
    folder, random = Path(export.__file__).parent / "model", np.random.default_rng(2**34)
    processor = AutoProcessor.from_pretrained(folder)
    reader = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    right = []
    for shape, tasks in ALL_BUT_SURE:
        scene = scenes.new_scene(random, **shape)
        for question in scenes.ask(scene, random, tasks, 4):
            text = processor.apply_chat_template(chat.chat_of(scene, question), tokenize=False)
            inputs = processor(text=[text], images=chat.pictures_of(scene), return_tensors="pt")
            with torch.no_grad():
                token = int(reader(**inputs).logits[0, -1].argmax())
            right.append(words.WORDS[token] == question.answer[0])
    assert len(right) == 20
    assert sum(right) >= 19
