"""What reuse leaves in the pages, row by row: stored rows turned by the right amount, and rows computed like a
dense model's.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from checkpoints import Family, cached_checkpoint
from e2e import inside
from e2e.dense import DenseModel
from e2e.engine import Ask, Engine, Part
from e2e.test_reuse import SCENES, show_pictures


@pytest.fixture(scope="module")
def dense(family: Family) -> DenseModel:
    return DenseModel(cached_checkpoint(family, 256, 4, root=Path(".checkpoints"), dtype="float32"))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# Rows come out of sums of about 1000 products, in another order than in the reference, through 4 layers: a few
# hundred roundings.
TOLERANCE = 400 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "scene", ["under longer text", "two in the other order", "text between", "three", "the same twice"]
)
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.3])
def test_pages_hold_rotated_rows_where_reused_and_dense_rows_elsewhere(
    fresh: Engine, dense: DenseModel, scene: str, ratio: float
) -> None:
    show_pictures(fresh)
    check_pages(fresh, dense, SCENES[scene], ratio)


def check_pages(engine: Engine, dense: DenseModel, parts: Sequence[Part], ratio: float) -> None:
    """Ask, and look at the pages; all media are known, and one of them at least stands at another place than before."""
    engine.call(inside.watch_jobs)
    engine.ask_one(Ask(parts, ratio=ratio, policy="leading"))
    job = engine.call(inside.last_job)
    pages, positions = job["pages"], job["positions"]

    is_reused = torch.zeros(pages.shape[2], dtype=torch.bool)
    moved = set()
    for span in job["spans"]:
        for run in span["reused"]:
            is_reused[run.start : run.end] = True
            rows = slice(run.start - span["offset"], run.end - span["offset"])
            entry = span["entry"][:, :, rows]
            assert torch.equal(pages[:, 1, run.start : run.end], entry[:, 1]), "values are copied bit for bit"
            delta = positions[:, run.start : run.end] - span["stored_positions"][:, rows]
            assert bool((delta == delta[0, 0]).all())
            moved.add(int(delta[0, 0]))
            cos, sin = dense.rotary(delta)
            for layer in range(len(entry)):
                expected = dense.rotate(entry[layer, 0], cos, sin)
                assert relative_error(pages[layer, 0, run.start : run.end], expected) < TOLERANCE
    assert moved - {0}, "the scene must move at least one picture"

    assert not any(is_reused[run.start : run.end].any() for run in job["recomputed"])
    expected = dense.recompute(job["token_ids"], positions, ~is_reused, pages, job["embeddings"])
    assert relative_error(pages, expected) < TOLERANCE


def test_only_chosen_rows_change_with_the_ratio(fresh: Engine) -> None:
    """Between two ratios the pages differ in rows that one of them recomputes and the other reuses, and in
    recomputed rows.
    """
    show_pictures(fresh)
    fresh.call(inside.watch_jobs)
    jobs = []
    for ratio in (0.0, 0.3):
        fresh.forget()
        fresh.ask_one(Ask(SCENES["under longer text"], ratio=ratio, policy="leading"))
        jobs.append(fresh.call(inside.last_job))
    (span,) = jobs[1]["spans"]
    (run,) = span["reused"]
    both = slice(run.start, run.end)
    assert torch.equal(jobs[0]["pages"][:, :, both], jobs[1]["pages"][:, :, both])
    chosen = slice(span["offset"], run.start)
    assert not torch.equal(jobs[0]["pages"][1:, :, chosen], jobs[1]["pages"][1:, :, chosen])


def weights_of(values: torch.Tensor, samples: list[int]) -> torch.Tensor:
    """How tokens follow samples [tokens, samples], given stored values [tokens, features]: ridge regression on features
    and a constant, which is not penalised, as one system of least squares in double precision.
    """
    known = values[samples].double()
    centred = known - known.mean(0)
    penalty = 0.01 * centred.square().sum(1).mean()
    count, width = known.shape
    slopes = torch.cat((known, torch.eye(width).double() * penalty.sqrt()))
    constant = torch.cat((torch.ones(count), torch.zeros(width))).double()[:, None]
    wanted = torch.cat((torch.eye(count), torch.zeros(width, count))).double()
    fit = torch.linalg.lstsq(torch.cat((slopes, constant), dim=1), wanted, driver="gelsd").solution
    return torch.cat((values.double(), torch.ones(len(values), 1).double()), dim=1) @ fit


@pytest.mark.parametrize("scene", ["under longer text", "two in the other order", "three", "the same twice"])
def test_shifted_rows_move_by_what_the_samples_of_their_span_changed(
    fresh: Engine, dense: DenseModel, scene: str
) -> None:
    show_pictures(fresh)
    fresh.call(inside.watch_jobs)
    fresh.ask_one(Ask(SCENES[scene], ratio=0.2, policy="shifted"))
    job = fresh.call(inside.last_job)
    pages, positions = job["pages"], job["positions"]
    is_reused = torch.zeros(pages.shape[2], dtype=torch.bool)
    num_moved = 0
    for span in job["spans"]:
        offset, stored, entries = span["offset"], span["stored_positions"], span["entry"]
        end = offset + entries.shape[2]
        here = [t for r in job["recomputed"] for t in range(max(r.start, offset), min(r.end, end))]
        there = [t - offset for t in here]
        assert len(here) == math.ceil(0.2 * (end - offset))
        places, old_places = dense.rotary(positions[:, here]), dense.rotary(stored[:, there])
        weights = weights_of(entries[(len(entries) - 1) // 2, 1].flatten(1), there)
        for run in span["reused"]:
            is_reused[run.start : run.end] = True
        rows = is_reused[offset:end].nonzero()[:, 0]
        turns, now = (
            dense.rotary((positions[:, offset:end] - stored)[:, rows]),
            dense.rotary(positions[:, offset + rows]),
        )
        for layer, entry in enumerate(entries):
            fresh_keys = dense.rotate(pages[layer, 0, here], places[0], -places[1])
            keys = fresh_keys - dense.rotate(entry[0, there], old_places[0], -old_places[1])
            changes = torch.stack((keys, pages[layer, 1, here] - entry[1, there]))
            moved = torch.einsum("ts,cshd->cthd", weights[rows], changes.double()).float()
            num_moved += int(moved[0].abs().max() > 0.01 * entry[0].abs().max())
            expected_keys = dense.rotate(entry[0, rows], *turns) + dense.rotate(moved[0], *now)
            assert relative_error(pages[layer, 0, offset + rows], expected_keys) < TOLERANCE
            assert relative_error(pages[layer, 1, offset + rows], entry[1, rows] + moved[1]) < TOLERANCE
    assert num_moved > 0, "the scene must change what the pictures' keys are"
    expected = dense.recompute(job["token_ids"], positions, ~is_reused, pages, job["embeddings"])
    assert relative_error(pages, expected) < TOLERANCE, "samples see the moved rows in every layer"
