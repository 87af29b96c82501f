"""What the log says at debug level of each request, and of work before it is launched."""

import logging
import re
from collections.abc import Iterator

import pytest

from engine.conftest import MakeEngine
from engine.fake_prompts import Ask
from engine.scenes import PROMPT, fail, show
from vlcache_connector.engine import debug
from vlcache_connector.engine.metadata import ReusePiece, SaveJob, SpanLoad, VLCacheMetadata
from vlcache_connector.exec.model import Prompt
from vlcache_connector.types import Extent, Run


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What is logged at debug level."""
    listening, level = Lines(), debug.logger.level
    debug.logger.addHandler(listening)
    debug.logger.setLevel(logging.DEBUG)
    yield listening
    debug.logger.setLevel(level)
    debug.logger.removeHandler(listening)


def words(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", line))


def test_each_request_leaves_one_line_that_agrees_with_its_report(make_engine: MakeEngine, lines: Lines) -> None:
    engine = make_engine(max_batched_tokens=8)
    show(engine)
    lines.texts.clear()
    for ask in (Ask(PROMPT, ratio=0.5), Ask(PROMPT, ratio=0.5), Ask(PROMPT, "off"), Ask(PROMPT, salt="stranger")):
        (answer,) = engine.ask(ask)
        (line,) = [text for text in lines.texts if "is over" in text]
        lines.texts.clear()
        found, report = words(line), answer.report
        kinds = ("prefix_cached", "reused", "recomputed", "computed")
        assert [int(found[kind]) for kind in kinds] == [report[f"{kind}_tokens"] for kind in kinds]
        assert found["mode"] == ask.mode and found["ratio"] == str(ask.ratio)
        assert int(found["prompt"]) == sum(report[f"{kind}_tokens"] for kind in kinds)
        assert found["reason"] == str(report.get("reason")) and found["tier"] == str(report["tier"])
        assert (found["load"] == "done") == (report["reused_tokens"] > 0)
    assert found["spans"] == "2" and found["known"] == "0" and found["load"] == "none"


def test_the_line_of_a_load_counts_its_pieces_and_the_time_it_took(make_engine: MakeEngine, lines: Lines) -> None:
    engine = make_engine(max_batched_tokens=8)
    show(engine)
    before = len(engine.steps)
    engine.ask(Ask(PROMPT, ratio=1.0))
    pieces = [piece for output in engine.steps[before:] for piece in output.kv_connector_metadata.reuse]
    found = words(lines.texts[-1])
    assert int(found["pieces"]) == len(pieces) > 1 and float(found["waited_ms"]) > 0
    assert found["spans"] == found["known"] == "2"


def test_the_line_says_why_a_load_failed_and_that_one_was_not_over(make_engine: MakeEngine, lines: Lines) -> None:
    engine = make_engine(max_batched_tokens=8)
    show(engine)
    fail(engine, "piece", 0)
    engine.ask(Ask(PROMPT))
    assert "load=failed(" in lines.texts[-1] and words(lines.texts[-1])["reason"] == "load_failed"
    engine.forget()
    name = engine.add(Ask(PROMPT, ratio=1.0))
    while engine.status(name) != "WAITING_FOR_REMOTE_KVS":
        engine.step()
    engine.abort(name)
    assert f"request {name} is over" in lines.texts[-1] and "load=unfinished" in lines.texts[-1]
    engine.run()


def test_nothing_is_formatted_when_nobody_listens(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not debug.logger.isEnabledFor(logging.DEBUG)

    def forbidden(*_: object) -> str:
        raise AssertionError("formatted")

    for name in ("_words", "_piece", "_run"):
        monkeypatch.setattr(debug, name, forbidden)
    engine = make_engine()
    show(engine)
    engine.ask(Ask(PROMPT))
    debug.launching(VLCacheMetadata(reuse=[piece()]))


def piece(error: str | None = None) -> ReusePiece:
    span = SpanLoad(10, 20, Extent(0, 1), Extent(1, 1), (Run(12, 30),))
    return ReusePiece(7, "a-request", Prompt((), ()), (1, 2), (span,), (Run(0, 10), Run(10, 12)), True, error)


def test_a_step_names_its_jobs_before_they_start(lines: Lines) -> None:
    save = SaveJob(8, "another", Prompt((), ()), (3,), Run(4, 9), Extent(2, 1))
    debug.launching(VLCacheMetadata(reuse=[piece(), piece("the request was aborted")], saves=[save]))
    (line,) = lines.texts
    assert "reuse 7 of a-request: load 10:12-30, recompute 0-10+10-12, the last piece" in line
    assert "nothing, the request was aborted" in line and "save 8 of another 4-9" in line
    lines.texts.clear()
    debug.launching(VLCacheMetadata())
    assert not lines.texts
