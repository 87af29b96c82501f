"""Deeper layers that recompute less, on the real engine: rows of the pages layer by layer, against transformers'
layers, and what the response says.
"""

import math
from typing import Any

import pytest
import torch

from e2e import inside
from e2e.dense import DenseModel
from e2e.engine import Answer, Ask, Engine
from e2e.test_pages import TOLERANCE, dense, relative_error
from e2e.test_reuse import SCENES, bound, show_pictures
from vlcache_connector.policy.base import num_chosen
from vlcache_connector.policy.shifted import MIN_SAMPLES
from vlcache_connector.types import Run

__all__ = ["bound", "dense"]
LAYERS = 4
every_scene = pytest.mark.parametrize("scene", ["under longer text", "two in the other order", "three"])


def job_of(engine: Engine, scene: str, policy: str, ratio: Any) -> tuple[dict[str, Any], Answer]:
    show_pictures(engine)
    engine.call(inside.watch_jobs)
    params = {"mode": "reuse", "policy": policy, "recompute_ratio": ratio, "explain": True}
    answer = engine.ask_one(Ask(SCENES[scene], params=params))
    job: dict[str, Any] = engine.call(inside.last_job)
    return job, answer


def window_of(span: dict[str, Any], num_tokens: int) -> slice:
    return slice(span["offset"], min(span["offset"] + span["entry"].shape[2], num_tokens))


def turned(job: dict[str, Any], span: dict[str, Any], dense: DenseModel) -> torch.Tensor:
    """Stored rows [layers, 2, tokens, heads, dim] with keys where the span is now."""
    window = window_of(span, job["pages"].shape[2])
    length = window.stop - window.start
    delta = job["positions"][:, window] - span["stored_positions"][:, :length]
    rows = span["entry"][:, :, :length].clone()
    for layer in rows:
        layer[0] = dense.rotate(layer[0], *dense.rotary(delta))
    return rows


def assert_rows_are_dense(job: dict[str, Any], is_computed: torch.Tensor, dense: DenseModel) -> None:
    """`is_computed` [layers, tokens]: what each layer made itself, seeing what the pages hold of the others."""
    expected = dense.recompute(job["token_ids"], job["positions"], is_computed, job["pages"], job["embeddings"])
    assert relative_error(job["pages"], expected) < TOLERANCE


def layers_of(answer: Answer) -> float:
    """Tokens of pictures that are recomputed, on average over layers, as the explained plan says."""
    total = 0
    for span in answer.report["plan"]["spans"]:
        count = sum(end - start for start, end in span["recomputed"])
        by_layer = [count] * LAYERS
        for deeper in span["deeper"]:
            by_layer[deeper["layer"] :] = [deeper["count"]] * (LAYERS - deeper["layer"])
        total += sum(by_layer)
    return total / LAYERS


@every_scene
@pytest.mark.parametrize("policy", ["leading", "shifted"])
@pytest.mark.parametrize("ratios", [[0.5, 0.3, 0.3, 0.1], [0.4, 0.4, 0.0, 0.0]], ids=str)
def test_each_layer_recomputes_as_much_as_its_ratio_says(
    fresh: Engine, dense: DenseModel, scene: str, policy: str, ratios: list[float]
) -> None:
    job, answer = job_of(fresh, scene, policy, ratios)
    num_tokens, at_least = job["pages"].shape[2], MIN_SAMPLES if policy == "shifted" else 1
    is_computed = torch.ones(LAYERS, num_tokens, dtype=torch.bool)
    for span in job["spans"]:
        window = window_of(span, num_tokens)
        inside_span = (run.intersect(Run(window.start, window.stop)) for run in job["recomputed"])
        runs = tuple(run for run in inside_span if len(run))
        for layer in range(LAYERS):
            runs = next((one.runs for one in span["narrowings"] if one.layer == layer), runs)
            is_computed[layer, window] = False
            for run in runs:
                is_computed[layer, run.start : run.end] = True
        counts = is_computed[:, window].sum(1).tolist()
        assert counts == [num_chosen(span["entry"].shape[2], ratio, at_least) for ratio in ratios]
        expected, rows = turned(job, span, dense), job["pages"][:, :, window]
        for layer in range(LAYERS):
            is_stored = ~is_computed[layer, window]
            if policy == "leading" or ratios[layer] == 0:
                assert relative_error(rows[layer][:, is_stored], expected[layer][:, is_stored]) < TOLERANCE
    assert_rows_are_dense(job, is_computed, dense)
    text = num_tokens - sum(window_of(span, num_tokens).stop - span["offset"] for span in job["spans"])
    assert answer.report["recomputed_tokens"] == round(text + layers_of(answer))


def measured_spans(fresh: Engine, dense: DenseModel, scene: str, policy: str, layer: int) -> list[Any]:
    """Of each span, narrowed at `layer`: its count, stored rows where it is now, rows of the pages, and which of them
    were computed in the last layer. All spans together keep as many as their counts say.
    """
    job, answer = job_of(fresh, scene, policy, 0.2)
    num_tokens, found = job["pages"].shape[2], []
    is_computed = torch.ones(LAYERS, num_tokens, dtype=torch.bool)
    for span in job["spans"]:
        window, (narrowing,) = window_of(span, num_tokens), span["narrowings"]
        stored, rows = turned(job, span, dense), job["pages"][:, :, window]
        gaps = (rows - stored).abs().amax(dim=(1, 3, 4)) / stored.abs().amax(dim=(1, 2, 3, 4))[:, None]
        is_computed[narrowing.layer :, window] = (gaps > TOLERANCE)[-1]
        assert narrowing.layer == layer and narrowing.count == math.ceil(0.2 * len(gaps[0]))
        found.append((narrowing.count, stored, rows, is_computed[-1, window]))
    assert_rows_are_dense(job, is_computed, dense)
    assert answer.report["reused_tokens"] > 0 and answer.report["approximate"]
    assert sum(int(is_kept.sum()) for *_, is_kept in found) == sum(count for count, *_ in found)
    return found


@every_scene
def test_tokens_that_deviate_most_are_recomputed_in_all_layers(fresh: Engine, dense: DenseModel, scene: str) -> None:
    spans = measured_spans(fresh, dense, scene, "deviation", layer=2)
    # turning keys back does not change a distance
    deviations = torch.cat([(rows[1] - stored[1]).square().sum(dim=(0, 2, 3)) for _, stored, rows, _ in spans])
    is_kept = torch.cat([is_kept for *_, is_kept in spans])
    assert deviations[is_kept].min() >= deviations[~is_kept].max() * (1 - 1e-3)


@every_scene
def test_a_question_chooses_tokens_that_are_recomputed_in_all_layers(
    fresh: Engine, dense: DenseModel, scene: str
) -> None:
    measured_spans(fresh, dense, scene, "scored", layer=0)


@pytest.mark.parametrize("policy", ["deviation", "scored"])
def test_with_everything_chosen_the_answer_is_that_of_plain_vllm(fresh: Engine, bound: float, policy: str) -> None:
    show_pictures(fresh)
    fresh.forget()
    expected = fresh.ask_one(Ask(SCENES["three"], "off"))
    fresh.forget()
    answer = fresh.ask_one(Ask(SCENES["three"], ratio=1.0, policy=policy))
    assert answer.report["reused_tokens"] == 0 and answer.gap(expected) <= bound


def test_a_list_of_another_length_runs_as_plain_vllm_and_says_why(fresh: Engine) -> None:
    show_pictures(fresh)
    params = {"mode": "reuse", "policy": "leading", "recompute_ratio": [0.5, 0.1]}
    answer = fresh.ask_one(Ask(SCENES["three"], params=params))
    assert answer.report["reason"] == "invalid_options" and f"{LAYERS} layers" in answer.report["error"]
