"""The studies of reuse with the grid model compute what they say: exact KV, passes over entries, errors by token."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from grid_model import cases, chat, choices, contexts, errors, errors_plot, export, reuse, scenes, tally, tried
from grid_model.pictures import content_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlcache_connector.types import Run

MODEL = Path(export.__file__).parent / "model"


@pytest.fixture(scope="module")
def model() -> reuse.GridModel:
    torch.set_num_threads(1)
    return reuse.load(MODEL)


@pytest.fixture(scope="module")
def two_pictures(model: reuse.GridModel) -> cases.Case:
    return next(iter(cases.cases(model, "two pictures", 1, 12)))


@pytest.fixture(scope="module")
def measured(model: reuse.GridModel, two_pictures: cases.Case) -> errors.Errors:
    return errors.measure(model, two_pictures)


def test_answers_over_exact_kv_are_those_of_transformers(model: reuse.GridModel, two_pictures: cases.Case) -> None:
    case, processor = two_pictures, AutoProcessor.from_pretrained(MODEL)
    reader = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    pictures = chat.pictures_of(case.scene)
    for number, question in enumerate(case.questions[:3]):
        text = processor.apply_chat_template(chat.chat_of(case.scene, question), tokenize=False)
        with torch.no_grad():
            logits = reader(**processor(text=[text], images=pictures, return_tensors="pt")).logits[0, -1]
        first = int((case.expected.question == number).float().argmax())
        torch.testing.assert_close(case.expected.logits[first], logits, rtol=0.0, atol=1e-2)
    assert case.expected.right.all()


def test_recomputing_everything_is_exact_and_nothing_is_not(model: reuse.GridModel, two_pictures: cases.Case) -> None:
    case = two_pictures
    full = reuse.reuse(model, case.prompt, case.entries, [[Run(0, reuse.SPAN)]] * 2)
    torch.testing.assert_close(full, case.exact, rtol=0.0, atol=1e-3)
    none = reuse.reuse(model, case.prompt, case.entries, [[]] * 2)
    assert (none - case.exact).abs().max() > 1
    assert float(case.expected.divergence(reuse.answer(model, case.prompt, none, case.questions)).mean()) > 0.1


def test_an_entry_of_the_prompts_own_context_is_exact(model: reuse.GridModel) -> None:
    scene = scenes.new_scene(np.random.default_rng(5), filler=9)
    prompt = reuse.prompt_of(model, scene)
    kv = reuse.reuse(model, prompt, [reuse.entry(model, scene)], [[]])
    torch.testing.assert_close(kv, reuse.exact(model, prompt), rtol=0.0, atol=1e-4)


def test_a_change_that_is_common_to_all_tokens_is_undone_by_one_sample(
    model: reuse.GridModel, two_pictures: cases.Case
) -> None:
    case = two_pictures
    change = torch.randn(5, 2, 1, 2, 64, generator=torch.Generator().manual_seed(1))
    moved = [case.exact[:, :, span] + change for span in case.prompt.spans]
    for follow in (choices.mean, choices.nearest, choices.fit):
        kv = reuse.reuse(model, case.prompt, moved, [[Run(0, 1)]] * 2, follow)
        # The sample of a later layer is computed over a layer that is right up to rounding.
        torch.testing.assert_close(kv, case.exact, rtol=0.0, atol=1e-2)


def test_tokens_follow_the_samples_that_hold_what_they_hold() -> None:
    """Two kinds of tokens by turns: the mean is half of each, the others tell them apart."""
    kinds, kind = torch.randn(2, 1, 2, 64, generator=torch.Generator().manual_seed(3)), torch.arange(reuse.SPAN) % 2
    entry, samples = kinds[kind].expand(5, 2, -1, -1, -1, -1)[:, :, :, 0], torch.tensor([7, 40])
    own = torch.stack((kind, 1 - kind), 1).float()
    torch.testing.assert_close(choices.nearest(entry, samples), own)
    torch.testing.assert_close(choices.fit(entry, samples), own, rtol=0.0, atol=0.02)
    torch.testing.assert_close(choices.mean(entry, samples), torch.full((reuse.SPAN, 2), 0.5))


def test_under_a_legend_each_token_must_follow_its_own_kind(model: reuse.GridModel) -> None:
    case = next(iter(cases.cases(model, "legend", 1, 12)))
    kl = {
        name: float(case.expected.divergence(choices.METHODS[name].answers(model, case, 0.05)).mean())
        for name in ("none", "farthest + mean", "shifted")
    }
    assert kl["none"] > kl["farthest + mean"] > 10 * kl["shifted"]


def test_choices_take_the_share_that_they_were_given(model: reuse.GridModel, two_pictures: cases.Case) -> None:
    for name, method in choices.METHODS.items():
        runs = method.choose(model, two_pictures, 0.05, two_pictures.questions[0])
        tokens = [reuse.tokens_of(r).tolist() for r in runs]
        assert sum(map(len, tokens)) == (0 if name == "none" else 26)
        assert all(sorted(set(t)) == t and set(t) <= set(range(reuse.SPAN)) for t in tokens)


def test_a_question_looks_at_the_cell_it_asks_about(model: reuse.GridModel) -> None:
    prompt = reuse.prompt_of(model, scenes.new_scene(np.random.default_rng(6)))
    question = scenes.Question("at colour", ["colour", "at", "c5"], ["red"])
    score = choices.attention(model, prompt, reuse.exact(model, prompt), question)
    by_cell = score[prompt.spans[0]].view(8, 2, 8, 2).sum((1, 3))
    assert divmod(int(by_cell.argmax()), 8) == (4, 2)


def test_the_first_layer_has_no_error_and_what_is_reused_alone_touches_nothing_else_there(
    measured: errors.Errors,
) -> None:
    assert measured.own[:, 0].max() < 1e-5
    assert measured.handed_on[:, 0].max() == 0
    assert measured.own[:, 1:].min() > 1e-3


def test_the_second_layer_hands_on_nothing_as_its_input_saw_no_reused_kv_of_another_layer(
    measured: errors.Errors,
) -> None:
    """Its KV comes from attention over the first layer, where entries are exact."""
    assert measured.handed_on[:, 1].max() < 1e-5
    assert measured.handed_on[0, 2:].min() > 0


def test_the_last_block_hands_on_to_no_picture(measured: errors.Errors) -> None:
    assert measured.handed_on[1, :, :, -1].max() == 0
    assert measured.handed_on[0, 2:, :, -1].min() > 0


def test_small_errors_add_up(model: reuse.GridModel, two_pictures: cases.Case) -> None:
    """The sum rule is one of first order: with a hundredth of the deviation it holds to a few per cent."""
    case = two_pictures
    near = [
        case.exact[:, :, span] + 0.01 * (stored - case.exact[:, :, span])
        for span, stored in zip(case.prompt.spans, case.entries, strict=True)
    ]
    small = errors.measure(model, cases.Case(case.scene, case.questions, case.prompt, case.exact, near, case.expected))
    assert small.residual < 0.1
    assert errors.measure(model, case).residual > small.residual


def test_the_common_share_is_one_for_a_shift_and_that_of_a_mean_for_noise() -> None:
    shift, all_alike = torch.ones(1, 2, 256, 2, 64), torch.zeros(256, dtype=torch.int64)
    torch.testing.assert_close(errors.common_share(shift, all_alike), torch.ones(1, 2))
    noise = torch.randn(1, 2, 256, 2, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(errors.common_share(noise, all_alike), torch.full((1, 2), 1 / 256), rtol=0.5, atol=0.0)
    kind = torch.arange(256) % 4
    by_kind = noise[:, :, kind]
    torch.testing.assert_close(errors.common_share(by_kind, kind), torch.ones(1, 2))
    assert errors.common_share(by_kind, all_alike).max() < 0.5


def test_colours_are_counted_behind_the_empty_cell() -> None:
    contents = [0, content_of(0, 0), content_of(0, 7), content_of(1, 0)]
    assert errors.colours(np.array(contents)).tolist() == [0, 1, 1, 2]


def test_the_studies_write_tables_json_and_a_plot(measured: errors.Errors, tmp_path: Path) -> None:
    results = {"two pictures": errors.summary([measured])}
    shown = "\n".join(errors.lines(results))
    assert shown.count("| two pictures |") == 7
    assert json.loads(json.dumps(results)) == results
    errors_plot.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_policies_and_contexts_are_compared_on_the_same_questions() -> None:
    by_method = tried.compare(MODEL, ["two pictures"], ["leading", "shifted"], [0.05], 2, 4)
    assert by_method["exact"]["two pictures"]["kl"] == [0.0, 0.0, 0.0]
    assert by_method["none"]["two pictures"]["kl"][0] > by_method["shifted, 5%"]["two pictures"]["kl"][0]
    by_context = contexts.compare(MODEL, ["two pictures"], 2, 4)
    same = by_context["leading 5%, behind the chat template"]["two pictures"]
    assert same["kl"] == by_method["leading, 5%"]["two pictures"]["kl"]
    assert same["kl_more"] == same["right_more"] == [0.0, 0.0, 0.0]
    assert by_context["none 0%, behind nothing"]["two pictures"]["kl"] != same["kl"]
    assert len(list(tally.lines(by_method, "kl", 3))) == 2 + len(by_method)
