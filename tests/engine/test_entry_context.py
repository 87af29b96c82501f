"""What stands before an image when its KV is computed to be kept: the option `entry_context`."""

import pytest

from engine.conftest import MakeEngine
from engine.fake_engine import FakeEngine
from engine.fake_prompts import Ask, Image
from engine.scenes import BETWEEN, CLOSE, OPEN, A, B, reused


def kept(engine: FakeEngine) -> list[tuple[str, int]]:
    """How each KV entry was made, and how many tokens stood before the image."""
    metadata = [output.kv_connector_metadata for output in engine.steps]
    saved = [("saved", job.run.start) for m in metadata for job in m.saves]
    return saved + [("computed when idle", job.run.start) for m in metadata for job in m.compiles]


def test_first_keeps_what_the_first_request_computed(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.ask(Ask([*OPEN, A, *CLOSE]))
    assert kept(engine) == [("saved", len(OPEN))]


@pytest.mark.parametrize("mode", ["reuse", "exact"])
def test_alone_computes_every_entry_behind_one_token_when_idle(make_engine: MakeEngine, mode: str) -> None:
    engine = make_engine(entry_context="alone")
    engine.ask(Ask([*OPEN, A, *BETWEEN, B, *CLOSE], mode))
    engine.run()
    assert kept(engine) == [("computed when idle", 1)] * 2
    engine.forget()
    (answer,) = engine.ask(Ask([*BETWEEN, B, *OPEN, A, *CLOSE]))
    assert reused(answer) > 0 and "reason" not in answer.report


def test_alone_is_not_computed_twice_nor_for_a_prompt_that_begins_with_the_image(make_engine: MakeEngine) -> None:
    engine = make_engine(entry_context="alone")
    engine.add(Ask([A, *CLOSE]))
    engine.add(Ask([*OPEN, A, *CLOSE]))
    engine.run()
    engine.ask(Ask([*BETWEEN, A, *CLOSE]))
    assert kept(engine) == [("computed when idle", 0)]


def test_alone_never_means_behind_a_token_of_another_image(make_engine: MakeEngine) -> None:
    engine = make_engine(entry_context="alone")
    engine.ask(Ask([*OPEN, A, B, *CLOSE]))
    engine.run()
    assert kept(engine) == [("computed when idle", 1), ("computed when idle", 0)]


def test_a_picture_behind_a_reused_one_is_computed_behind_the_opening_or_alone(make_engine: MakeEngine) -> None:
    for context, before in (("first", len(OPEN)), ("alone", 1)):
        engine = make_engine(entry_context=context)
        engine.ask(Ask([*OPEN, A, *CLOSE]))
        engine.run()
        engine.forget()
        engine.ask(Ask([*OPEN, A, *BETWEEN, Image("new", 10), *CLOSE], ratio=0.05))
        engine.run()
        assert kept(engine)[-1] == ("computed when idle", before)
        assert engine.counts["hits"] == 1
