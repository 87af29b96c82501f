"""Videos, with vLLM's own scheduler: reused like images, never in place of one, nor of a video at another speed."""

from collections import Counter

import pytest

from engine.conftest import MakeEngine
from engine.fake_engine import FakeEngine
from engine.fake_prompts import Ask, Image, Video
from engine.scenes import BETWEEN, CLOSE, OPEN, A, reused, show
from vlcache_connector.types import EntryClass

V, W = Video("V", 20), Video("W", 14, seconds=0.5)


def classes(engine: FakeEngine) -> Counter[EntryClass]:
    return Counter(entry.entry_class for entry in engine.session.index._entries.values())


@pytest.mark.parametrize(
    "prompt",
    [[*OPEN, V, *CLOSE], [*OPEN, A, *BETWEEN, V, *CLOSE], [W, V, *CLOSE], [*OPEN, V, A, *BETWEEN, W, *CLOSE]],
    ids=["alone", "behind an image", "two", "around an image"],
)
def test_known_videos_are_reused_and_not_encoded_again(make_engine: MakeEngine, prompt: list[int | Image]) -> None:
    engine = make_engine()
    show(engine, A, V, W)
    num_encoded = len(engine.encoded)
    (answer,) = engine.ask(Ask(prompt))
    assert reused(answer) > 0 and "reason" not in answer.report
    assert len(engine.encoded) == num_encoded


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


@pytest.mark.parametrize(("shown", "asked"), [(V, Image("V", 20)), (Image("V", 20), V)], ids=["image", "video"])
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


def test_at_another_speed_the_encoder_output_is_reused_and_the_kv_is_not(make_engine: MakeEngine) -> None:
    """The same frames give the same encoder output, but their tokens lie at other positions in time."""
    engine = make_engine()
    show(engine, V)
    faster = Video("V", 20, seconds=0.25)
    engine.scheduler.reset_encoder_cache()
    (answer,) = engine.ask(Ask([*OPEN, faster, *CLOSE]))
    assert answer.report["reason"] == "miss" and engine.encoded == [V.identifier]
    engine.forget()
    for known in (faster, V):
        (answer,) = engine.ask(Ask([*BETWEEN, known, *CLOSE]))
        assert reused(answer) > 0
        engine.forget()


def test_a_video_behind_reused_media_is_learnt_when_the_engine_is_idle(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine, A)
    engine.ask(Ask([*OPEN, A, *BETWEEN, V, *CLOSE]))
    engine.run()
    engine.forget()
    assert classes(engine)[EntryClass("kv", "video")] == 1
    (job,) = [job for output in engine.steps for job in output.kv_connector_metadata.compiles]
    (media,) = job.prompt.media
    assert (media.modality, media.grid, media.seconds) == ("video", V.grid, V.seconds)
