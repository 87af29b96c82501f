"""What reuse leaves in the pages, row by row: stored rows turned by the right amount, and rows computed like a
dense model's.
"""

from pathlib import Path

import pytest
import torch

from checkpoints import Family, cached_checkpoint
from e2e import inside
from e2e.dense import DenseModel
from e2e.engine import Ask, Engine
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
    fresh.call(inside.watch_jobs)
    fresh.ask_one(Ask(SCENES[scene], ratio=ratio))
    job = fresh.call(inside.last_job)
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
    embeddings = [(span["offset"], span["embedding"]) for span in job["spans"]]
    expected = dense.recompute(job["token_ids"], positions, ~is_reused, pages, embeddings)
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
        fresh.ask_one(Ask(SCENES["under longer text"], ratio=ratio))
        jobs.append(fresh.call(inside.last_job))
    (span,) = jobs[1]["spans"]
    (run,) = span["reused"]
    both = slice(run.start, run.end)
    assert torch.equal(jobs[0]["pages"][:, :, both], jobs[1]["pages"][:, :, both])
    chosen = slice(span["offset"], run.start)
    assert not torch.equal(jobs[0]["pages"][1:, :, chosen], jobs[1]["pages"][1:, :, chosen])
