"""Videos, with vLLM's own scheduler: reused like images, never in place of one, nor of a video at another speed. Both
kinds: frames without anything between them, and with text. What crosses to the workers is checked by `fake_worker`.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from vllm.multimodal.inputs import PlaceholderRange

from engine.conftest import MakeEngine
from engine.fake_config import BLOCK_SIZE
from engine.fake_engine import FakeEngine
from engine.fake_prompts import Ask, Frames, Image, Video, request_of, text, truth_of
from engine.scenes import BETWEEN, CLOSE, OPEN, A, drop_entries, reused, show
from vlcache_connector.config import Options
from vlcache_connector.engine.requests import describe
from vlcache_connector.plan.keys import KeySpace
from vlcache_connector.types import EntryClass, Span

V, W = Video("V", 20), Video("W", 14, seconds=0.5)
F, G = Frames("F", 24), Frames("G", 20, num_frames=2)


def classes(engine: FakeEngine) -> Counter[EntryClass]:
    return Counter(entry.entry_class for entry in engine.session.index._entries.values())


@pytest.mark.parametrize(
    "prompt",
    [
        [*OPEN, V, *CLOSE],
        [*OPEN, A, *BETWEEN, V, *CLOSE],
        [W, V, *CLOSE],
        [*OPEN, V, A, *BETWEEN, W, *CLOSE],
        [*OPEN, F, *CLOSE],
        [*OPEN, A, *BETWEEN, G, *CLOSE],
        [G, F, *CLOSE],
        [*OPEN, F, A, *BETWEEN, W, G, *CLOSE],
    ],
    ids=["alone", "behind an image", "two", "around an image"]
    + [f"{scene}, text between" for scene in ("alone", "behind an image", "two", "around an image")],
)
@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_known_videos_are_reused_and_not_encoded_again(
    make_engine: MakeEngine, prompt: list[int | Image], ratio: float
) -> None:
    engine = make_engine()
    show(engine, A, V, W, F, G)
    num_encoded = len(engine.encoded)
    (answer,) = engine.ask(Ask(prompt, ratio=ratio))
    assert "reason" not in answer.report
    assert reused(answer) == sum(
        part.num_tokens - math.ceil(ratio * part.num_tokens) for part in prompt if isinstance(part, Image)
    )
    assert len(engine.encoded) == num_encoded


def test_entries_have_a_row_for_each_token_and_for_each_that_is_not_text(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine, F, G)
    rows = [(entry.entry_class.kind, entry.num_tokens) for entry in engine.session.index._entries.values()]
    assert sorted(rows) == [("embedding", 14), ("embedding", 15), ("kv", 20), ("kv", 24)]


def test_entries_of_videos_are_of_a_class_of_their_own(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine, A, V, W)
    assert classes(engine) == {
        EntryClass("kv", "image"): 1,
        EntryClass("embedding", "image"): 1,
        EntryClass("kv", "video"): 2,
        EntryClass("embedding", "video"): 2,
    }


def test_a_quota_of_videos_holds_for_videos_only(make_engine: MakeEngine) -> None:
    engine = make_engine(quotas={"video": 0.1})
    show(engine, A, *(Video(f"video {number}", 20) for number in range(12)))
    sizes: Counter[str] = Counter()
    for entry in engine.session.index._entries.values():
        sizes[entry.entry_class.modality] += entry.extent.nbytes
    assert 0 < sizes["video"] <= 0.1 * (1 << 20)
    assert engine.counts["evictions:quota"] > 0
    (answer,) = engine.ask(Ask([*OPEN, A, *CLOSE]))
    assert reused(answer) > 0


@pytest.mark.parametrize(
    ("shown", "asked"), [(V, Image("V", 20)), (Image("V", 20), V), (F, Image("F", 24))], ids=["image", "video", "text"]
)
def test_neither_is_taken_for_the_other_under_one_identifier(
    make_engine: MakeEngine, shown: Image, asked: Image
) -> None:
    engine = make_engine()
    show(engine, shown)
    engine.scheduler.reset_encoder_cache()
    assert shown.identifier == asked.identifier
    (answer,) = engine.ask(Ask([*OPEN, asked, *CLOSE]))
    assert answer.report["reason"] == "miss" and reused(answer) == 0
    assert engine.encoded == [asked.identifier] * 2


@pytest.mark.parametrize(
    ("video", "faster"), [(V, replace(V, seconds=0.25)), (F, replace(F, seconds=2))], ids=["places", "text between"]
)
def test_at_another_speed_the_encoder_output_is_reused_and_the_kv_is_not(
    make_engine: MakeEngine, video: Image, faster: Image
) -> None:
    """The same frames give the same encoder output, but their tokens lie at other positions in time, or behind other
    text.
    """
    engine = make_engine()
    show(engine, video)
    assert faster.identifier == video.identifier
    engine.scheduler.reset_encoder_cache()
    (answer,) = engine.ask(Ask([*OPEN, faster, *CLOSE]))
    assert answer.report["reason"] == "miss" and engine.encoded == [video.identifier]
    engine.forget()
    for known in (faster, video):
        (answer,) = engine.ask(Ask([*BETWEEN, known, *CLOSE]))
        assert reused(answer) > 0
        engine.forget()


def test_equal_tokens_with_encoder_output_in_other_places_are_another_entry() -> None:
    keys, ask = KeySpace(b"kv", b"embedding"), Ask([*OPEN, F, *CLOSE])
    spans = list[Span]()
    for shift in (0, 1):
        request = request_of(ask, truth_of("a request", ask), None)
        place = request.mm_features[0].mm_position
        assert place.is_embed is not None
        moved = PlaceholderRange(place.offset, place.length, place.is_embed.roll(shift))
        request.mm_features = [replace(request.mm_features[0], mm_position=moved)]
        spans += describe(request, keys, Options(), 1).spans
    one, other = spans
    assert one.num_embedded == other.num_embedded and one.embedding_key == other.embedding_key
    assert one.kv_key != other.kv_key


@pytest.mark.parametrize("video", [V, F], ids=["dense", "text between"])
def test_a_video_behind_reused_media_is_learnt_when_the_engine_is_idle(make_engine: MakeEngine, video: Image) -> None:
    engine = make_engine()
    show(engine, A)
    engine.ask(Ask([*OPEN, A, *BETWEEN, video, *CLOSE]))
    engine.run()
    engine.forget()
    assert classes(engine)[EntryClass("kv", "video")] == 1
    (job,) = [job for output in engine.steps for job in output.kv_connector_metadata.compiles]
    (media,) = job.prompt.media
    assert (media.modality, media.grid) == ("video", video.grid)
    assert media.seconds == (video.seconds if isinstance(video, Video) else None)
    assert job.prompt.token_ids == (*OPEN, *video.token_ids)
    (answer,) = engine.ask(Ask([*CLOSE, video, *BETWEEN]))
    assert reused(answer) > 0


def test_a_video_alone_in_its_entry_is_computed_behind_the_token_before_it(make_engine: MakeEngine) -> None:
    engine = make_engine(entry_context="alone")
    engine.ask(Ask([*OPEN, F, *CLOSE]))
    engine.run()
    (job,) = [job for output in engine.steps for job in output.kv_connector_metadata.compiles]
    assert job.prompt.token_ids == (OPEN[-1], *F.token_ids)


def test_stored_encoder_output_serves_requests_that_reuse_no_kv(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine, F, G)
    engine.scheduler.reset_encoder_cache()
    engine.ask(Ask([*OPEN, G, *BETWEEN, F, *CLOSE], "exact"))
    assert engine.encoded == [F.identifier, G.identifier] and engine.counts["loaded_embeddings"] == 2


def test_a_video_whose_frames_are_in_the_prefix_cache_is_not_saved_when_its_last_text_is_computed(
    make_engine: MakeEngine,
) -> None:
    """vLLM does not need its encoder output then, and need not have it."""
    engine = make_engine()
    before = text("aligned", 1 - F.num_tokens % -BLOCK_SIZE)  # so that the video ends with the first token of a block
    engine.ask(Ask([*before, F, *CLOSE], "off"))
    engine.scheduler.reset_encoder_cache()
    for worker in engine.workers:
        worker.encoder_cache.clear()
    (answer,) = engine.ask(Ask([*before, F, *BETWEEN]))
    assert answer.report["prefix_cached_tokens"] == len(before) + F.num_tokens - 1
    assert not classes(engine) and engine.encoded == [F.identifier]


def test_videos_with_text_between_their_frames_come_back_from_disk(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(disk_path=str(tmp_path))
    show(engine, F, A)
    assert engine.session.lower.drain(10)
    drop_entries(engine)
    encoded = list(engine.encoded)
    (answer,) = engine.ask(Ask([*BETWEEN, A, F, *CLOSE]))
    assert reused(answer) > 0 and answer.report["tier"] == "disk" and engine.encoded == encoded


def test_prompts_with_videos_are_audited(make_engine: MakeEngine) -> None:
    """One is reused, with others that are not: computed before it, and new behind it."""
    engine = make_engine(audit_fraction=1.0)
    show(engine, F, G)
    engine.ask(Ask([*OPEN, G, *BETWEEN], "exact"))
    (answer,) = engine.ask(Ask([*OPEN, G, *BETWEEN, F, *BETWEEN, Frames("new", 18), *CLOSE]))
    engine.run()
    assert reused(answer) > 0 and engine.counts["audits"] == 1
    (job,) = [job for output in engine.steps for job in output.kv_connector_metadata.audits]
    assert len(job.piece.spans) == 1 and len(job.embeddings) == 2
