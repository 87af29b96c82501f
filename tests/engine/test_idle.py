"""Images that are learnt when the engine is idle, and the embedding that each of them is computed from: its save may be
under way, fail, belong to an older epoch, or never be answered.
"""

import pytest

from engine.conftest import MakeEngine
from engine.fake_engine import FakeEngine
from engine.fake_prompts import Ask, Image
from engine.scenes import BETWEEN, CLOSE, OPEN, A, B, C, counts, fail, reused, show
from vlcache_connector.engine import idle
from vlcache_connector.engine.session import SchedulerSession
from vlcache_connector.store.host import HostEntry
from vlcache_connector.types import EntryClass

UNSEEN = (B, C, Image("D", 8))


def behind_reuse(*images: Image, max_tokens: int = 1) -> Ask:
    return Ask([*OPEN, A, *BETWEEN, *images, *CLOSE], max_tokens=max_tokens)


def is_known(engine: FakeEngine, image: Image) -> bool:
    engine.forget()
    return reused(*engine.ask(Ask([*BETWEEN, image, *CLOSE], ratio=0.0))) == image.num_tokens


def num_dropped(engine: FakeEngine) -> int:
    return int(counts(engine).get("dropped_saves:not_compiled", 0))


@pytest.fixture
def engine(make_engine: MakeEngine) -> FakeEngine:
    """It knows A."""
    engine = make_engine()
    show(engine, A)
    return engine


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_images_behind_a_reused_one_are_learnt_however_short_the_answer(engine: FakeEngine, max_tokens: int) -> None:
    """With asynchronous scheduling the step after the only one is planned, idle, while its saves are not answered."""
    (answer,) = engine.ask(behind_reuse(*UNSEEN, max_tokens=max_tokens))
    assert reused(answer) > 0 and num_dropped(engine) == 0
    assert all(is_known(engine, image) for image in UNSEEN)


def test_an_image_whose_embedding_was_not_saved_is_dropped(engine: FakeEngine) -> None:
    fail(engine, "save", engine.size.num_ranks - 1)
    engine.ask(behind_reuse(B))
    assert num_dropped(engine) == 1 and not is_known(engine, B)


def test_a_reset_while_an_embedding_is_saved_leaves_nothing_to_wait_for(engine: FakeEngine) -> None:
    engine.add(behind_reuse(B))
    while not len(engine.scheduler.connector._scheduler._saves.compiles):
        engine.step()
    assert engine.scheduler.reset_connector_cache()
    engine.run()
    assert not is_known(engine, B)


def somebody_saves(engine: FakeEngine, image: Image) -> HostEntry:
    """From now on nobody else does, until this is answered."""
    session: SchedulerSession = engine.session
    key, nbytes = session.keys.embedding("image", image.identifier, None), session.layout.embedding_nbytes(1)
    entry = session.reserve(key, nbytes * image.num_tokens, image.num_tokens, EntryClass("embedding", "image"))
    assert entry is not None
    return entry


def test_one_that_waits_does_not_keep_others_from_being_learnt(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = somebody_saves(engine, B)
    monkeypatch.setattr(idle, "MAX_WAIT_S", 3600)
    engine.add(behind_reuse(B, C))
    for _ in range(50):
        engine.step()
    assert engine.has_work and num_dropped(engine) == 0
    (job,) = (job for output in engine.steps for job in output.kv_connector_metadata.compiles)
    assert len(job.run) == C.num_tokens
    engine.session.index.discard(entry)
    engine.run()
    assert num_dropped(engine) == 1


def test_a_save_that_is_never_answered_is_not_waited_for_for_ever(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = somebody_saves(engine, B)
    monkeypatch.setattr(idle, "MAX_WAIT_S", 0)
    engine.ask(behind_reuse(B))
    assert num_dropped(engine) == 1
    engine.session.index.discard(entry)
