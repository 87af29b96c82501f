"""Videos on the real engine: reused like pictures, those of Qwen2.5-VL and those of Qwen3-VL, which have text between
their frames. See `test_reuse` for the yardstick of agreement.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from checkpoints import Family, cached_checkpoint
from e2e import inside
from e2e.conftest import Start, emptied, watched
from e2e.dense import DenseModel
from e2e.engine import Ask, Engine, Part, Picture, Video
from e2e.test_pages import check_pages
from e2e.test_reuse import CLOSE, LONG, OPEN, RESOLUTION, A, noise_of, plain

V, W = Video(1), Video(2, num_frames=5, width=168, height=112, fps=0.25)
SCENES: dict[str, Sequence[Part]] = {
    "under longer text": [OPEN, LONG, V, "what happens?", CLOSE],
    "behind a picture": [OPEN, A, " then ", V, "what happens?", CLOSE],
    "before a picture": [OPEN, "look: ", V, A, "what happens?", CLOSE],
    "two in the order seen": [OPEN, "look: ", V, W, "same?", CLOSE],
    "two in the other order": [OPEN, "look: ", W, LONG, V, "same?", CLOSE],
    "as the very last tokens": [OPEN, A, "look: ", Video(1, is_closed=False)],
}
LIMITS = {"limit_mm_per_prompt": {"image": 2, "video": 2}, "max_model_len": 4096}


@pytest.fixture(scope="module")
def video_engine(start_here: Start, family: Family) -> Engine:
    return watched(start_here(f"videos-{family}", family, "float32", {}, **LIMITS))


@pytest.fixture
def knowing(video_engine: Engine) -> Iterator[Engine]:
    """An engine that has seen a picture and two videos, each alone; its encoder runs are counted from here on."""
    for engine in emptied(video_engine):
        for known in (A, V, W):
            answer = engine.ask_one(Ask([OPEN, "first seen here ", known, CLOSE]))
            assert answer.report["reason"] == "miss"
        engine.forget()
        assert engine.call(inside.count_encoder_runs) == 3
        yield engine


@pytest.fixture(scope="module")
def bound(video_engine: Engine) -> float:
    return 2 * max(noise_of(video_engine, [A, V]), noise_of(video_engine, [V, W])) + RESOLUTION


@pytest.fixture(scope="module")
def dense(family: Family) -> DenseModel:
    return DenseModel(cached_checkpoint(family, 256, 4, root=Path(".checkpoints"), dtype="float32"))


@pytest.mark.parametrize("scene", SCENES)
def test_recomputing_everything_equals_plain_vllm(knowing: Engine, bound: float, scene: str) -> None:
    expected = plain(knowing, SCENES[scene])
    knowing.forget()
    answer = knowing.ask_one(Ask(SCENES[scene], ratio=1.0))
    assert answer.report["recomputed_tokens"] > 0 and answer.report["reused_tokens"] == 0, answer
    assert answer.gap(expected) <= bound


@pytest.mark.parametrize("scene", SCENES)
def test_reuse_covers_the_prompt_up_to_the_last_item_without_the_encoder(knowing: Engine, scene: str) -> None:
    answer = knowing.ask_one(Ask(SCENES[scene], ratio=0.05))
    report = answer.report
    assert report["reused_tokens"] > 0 and report["approximate"]
    assert report["reused_tokens"] + report["recomputed_tokens"] == answer.num_cached_tokens
    assert report["computed_tokens"] < 20, "only what stands behind the last item is left"
    assert knowing.call(inside.count_encoder_runs) == 0


@pytest.mark.parametrize("scene", SCENES)
def test_pages_hold_rotated_rows_where_reused_and_dense_rows_elsewhere(
    knowing: Engine, dense: DenseModel, scene: str
) -> None:
    check_pages(knowing, dense, SCENES[scene], 0.1)


@pytest.mark.parametrize("scene", SCENES)
def test_positions_are_those_of_vllm(video_engine: Engine, family: Family, scene: str) -> None:
    """Seconds per step are 2 / 3 and 8 here: Qwen2.5-VL's steps are 2 or 3, and 32 positions apart. Qwen3-VL's are as
    far apart as a frame is high or wide, and as the text between is long.
    """
    found, expected = video_engine.call(inside.positions_of, Ask(SCENES[scene]))
    assert torch.equal(found, expected)
    steps = set((found[0, 1:] - found[0, :-1]).unique().tolist())
    assert {2, 3} <= steps if family == "qwen2_5_vl" else {0, 1, 4} <= steps


@pytest.mark.parametrize("cut", [32, 64, 96])
def test_reuse_builds_on_a_prefix_that_ends_within_a_video(knowing: Engine, bound: float, cut: int) -> None:
    parts = SCENES["two in the order seen"]
    expected = plain(knowing, parts)
    for ratio in (1.0, 0.05):
        knowing.forget()
        cached = knowing.call(inside.compute_prefix, Ask(parts, "off", max_tokens=2), cut)
        answer = knowing.ask_one(Ask(parts, ratio=ratio))
        assert answer.report["prefix_cached_tokens"] == cached == cut
        assert answer.report["recomputed_tokens"] > 0
        if ratio == 1.0:
            assert answer.gap(expected) <= bound


def test_frames_at_another_speed_are_a_miss(knowing: Engine, bound: float) -> None:
    faster = [OPEN, LONG, Video(1, fps=6.0), "what happens?", CLOSE]
    expected = plain(knowing, faster)
    (token,), slower = expected.token_ids, plain(knowing, SCENES["under longer text"]).logprobs
    assert abs(expected.logprobs[token] - slower.get(token, -math.inf)) > bound, "the speed matters"
    knowing.forget()
    answer = knowing.ask_one(Ask(faster, ratio=0.05))
    assert answer.report["reason"] == "miss" and answer.gap(expected) <= bound


def test_a_video_of_one_picture_is_not_taken_for_it(knowing: Engine) -> None:
    still = Video(7, num_frames=2, width=280, height=280, is_still=True)
    knowing.ask_one(Ask([OPEN, Picture(7), CLOSE]))
    knowing.forget()
    answer = knowing.ask_one(Ask([OPEN, LONG, still, CLOSE], ratio=0.05))
    assert answer.report["reason"] == "miss" and answer.report["reused_tokens"] == 0
    assert knowing.call(inside.count_encoder_runs) == 2
    knowing.forget()
    assert knowing.ask_one(Ask([OPEN, still, CLOSE], ratio=0.05)).report["reused_tokens"] > 0


def test_a_video_behind_a_reused_picture_is_learnt_when_idle(knowing: Engine, bound: float) -> None:
    new, again = Video(11), [LONG, Video(11), "again?", CLOSE]
    knowing.ask_one(Ask([OPEN, A, " then ", new, CLOSE], ratio=0.05))
    knowing.call(inside.run_idle)
    assert knowing.call(inside.counters)["compiled_entries"] == 1
    expected = plain(knowing, again)
    for ratio in (1.0, 0.05):
        knowing.forget()
        answer = knowing.ask_one(Ask(again, ratio=ratio))
        assert answer.report["tier"] == "host"
        if ratio == 1.0:
            assert answer.gap(expected) <= bound


def test_an_audit_computes_what_plain_vllm_does_and_finds_nothing_where_reuse_is_exact(
    knowing: Engine, bound: float
) -> None:
    """A video under the text that it was first seen under, and a new one behind it. The divergence is a mean of
    differences of log-probabilities, so it is within the bound on these.
    """
    parts = [OPEN, "first seen here ", V, "and then ", Video(11), CLOSE]
    expected = plain(knowing, parts)
    knowing.forget()
    knowing.call(inside.audit_everything)
    assert knowing.ask_one(Ask(parts, ratio=0.5)).report["reused_tokens"] > 0
    knowing.call(inside.run_idle)
    true = knowing.call(inside.last_audit)
    assert max(abs(true[token] - expected.logprobs[token]) for token in expected.logprobs) <= bound
    counts = knowing.call(inside.counters)
    assert counts["audits"] == 1 and max(counts["drift_kl"]) <= bound
    knowing.forget()
    knowing.ask_one(Ask(SCENES["two in the other order"], ratio=0.0))
    knowing.call(inside.run_idle)
    assert min(knowing.call(inside.counters)["drift_kl"]) > bound, "of reuse that is not exact it finds something"


def test_stored_encoder_output_serves_requests_that_reuse_no_kv(knowing: Engine, bound: float) -> None:
    parts = SCENES["two in the other order"]
    expected = plain(knowing, parts)
    assert knowing.call(inside.count_encoder_runs) == 2
    knowing.forget()
    answer = knowing.ask_one(Ask(parts, "exact"))
    assert answer.report["reused_tokens"] == 0 and answer.gap(expected) <= bound
    assert knowing.call(inside.count_encoder_runs) == 0


def test_the_encoder_connector_works_alone(start_here: Start) -> None:
    config = {
        "ec_connector": "VLCacheECConnector",
        "ec_connector_module_path": "vlcache_connector",
        "ec_role": "ec_both",
        "ec_connector_extra_config": {"host_gib": 0.03},
    }
    engine = start_here("encoder", "qwen3_vl", "float32", None, ec_transfer_config=config, **LIMITS)
    engine.call(inside.count_encoder_runs)
    answers = []
    for _ in range(2):
        engine.forget()
        answers.append(engine.ask_one(Ask(SCENES["before a picture"])))
    assert answers[0].logprobs == answers[1].logprobs
    assert engine.call(inside.count_encoder_runs) == 2, "a video and a picture, once"
