"""What the scheduler side knows of an image's content, and that requests and audits choose samples by it."""

import pytest

from engine.conftest import MakeEngine
from engine.fake_engine import FakeEngine
from engine.fake_prompts import Ask, Image, text
from engine.fake_records import Entry
from engine.scenes import PROMPT, A, B, C, drop_entries, reused, show
from vlcache_connector.engine.metadata import SpanLoad
from vlcache_connector.exec.model import Media
from vlcache_connector.plan.keys import entry_class
from vlcache_connector.policy import POLICIES
from vlcache_connector.policy.shifted import MIN_SAMPLES
from vlcache_connector.types import MAX_ORDERED, Run, Span

LARGE = Image("large", MAX_ORDERED + 20)


def span_of(engine: FakeEngine, image: Image, salt: str | None = None) -> Span:
    keys, media = engine.session.keys, Media(7, image.num_tokens, image.grid)
    name = (media.modality, image.identifier, salt)
    return Span(media.offset, media.length, keys.kv(*name, media.places), keys.embedding(*name))


def order_of(engine: FakeEngine, image: Image) -> list[int]:
    """What the first rank's worker has put into the entry."""
    entry = Entry("kv", image.identifier, None, image.num_tokens, weights=0)
    return list(engine.workers[0].entries.order(entry))


def orders(engine: FakeEngine, *spans: Span) -> list[list[int]]:
    return [list(order) for order in engine.session.orders(spans)]


def tokens(runs: tuple[Run, ...], offset: int) -> set[int]:
    return {position - offset for run in runs for position in range(run.start, run.end)}


def left_out(span: SpanLoad) -> set[int]:
    """Tokens of a span that are not loaded."""
    return set(range(span.length)) - tokens(span.reused, span.offset)


# -- what is known ----------------------------------------------------------------------------------------------------


def test_each_span_has_the_order_of_its_entry(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=400)
    show(engine, A, B, LARGE)
    spans = [span_of(engine, image) for image in (B, LARGE, A, B)]
    expected = [order_of(engine, image) for image in (B, LARGE, A, B)]
    assert orders(engine, *spans) == expected
    assert [len(order) for order in expected] == [B.num_tokens, MAX_ORDERED, A.num_tokens, B.num_tokens]
    assert engine.session.orders([]) == []


def test_of_unknown_spans_nothing_is_known(make_engine: MakeEngine) -> None:
    engine = make_engine()
    show(engine, A, B)
    spans = [span_of(engine, C), span_of(engine, A), span_of(engine, A, salt="somebody else's")]
    assert orders(engine, *spans) == [[], order_of(engine, A), []]
    drop_entries(engine)
    assert orders(engine, *spans) == [[], [], []]


def test_of_an_entry_that_is_being_written_nothing_is_known(make_engine: MakeEngine) -> None:
    engine = make_engine()
    span, session = span_of(engine, A), engine.session
    nbytes = session.layout.kv_nbytes(A.num_tokens)
    entry = session.reserve(span.kv_key, nbytes, A.num_tokens, entry_class("kv", "image", None))
    assert session.index.holds(span.kv_key) and orders(engine, span) == [[]]
    session.index.discard(entry)
    show(engine, A)
    assert orders(engine, span) == [order_of(engine, A)]


def test_where_workers_are_on_another_machine_nothing_is_known_and_samples_are_spread(make_engine: MakeEngine) -> None:
    engine = make_engine(policy="shifted")
    show(engine)
    engine.session.host_bytes = None  # as when `find_slabs` finds none
    assert orders(engine, span_of(engine, A), span_of(engine, B)) == [[], []]
    (answer,) = engine.ask(Ask(PROMPT, ratio=None))
    assert reused(answer) == A.num_tokens - MIN_SAMPLES, "and of the smaller one nothing"
    (piece,) = (p for output in engine.steps for p in output.kv_connector_metadata.reuse if p.spans and p.is_last)
    loads = {span.length: span for span in piece.spans}
    spread = POLICIES["shifted"].recompute(A.num_tokens, 0.02)
    assert left_out(loads[A.num_tokens]) == tokens(spread, 0)


# -- what follows from it ---------------------------------------------------------------------------------------------


def loads_of(engine: FakeEngine) -> list[SpanLoad]:
    """Of requests, in the order of their jobs."""
    return [span for output in engine.steps for piece in output.kv_connector_metadata.reuse for span in piece.spans]


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.75])
def test_a_request_recomputes_the_first_tokens_of_each_order(make_engine: MakeEngine, ratio: float) -> None:
    engine = make_engine(max_batched_tokens=256)
    show(engine)
    engine.ask(Ask(PROMPT, ratio=ratio, policy="shifted"))
    first, second = loads_of(engine)
    for span, image in ((first, B), (second, A)):
        chosen, order = left_out(span), order_of(engine, image)
        assert len(chosen) == max(MIN_SAMPLES, -(-ratio * image.num_tokens // 1))
        assert chosen == set(order[: len(chosen)])


def test_an_order_that_comes_back_from_disk_is_followed(make_engine: MakeEngine, tmp_path: object) -> None:
    engine = make_engine(max_batched_tokens=256, disk_path=f"{tmp_path}/disk")
    show(engine)
    assert engine.session.lower.drain(10)
    drop_entries(engine)
    (answer,) = engine.ask(Ask(PROMPT, policy="shifted"))
    assert answer.report["tier"] == "disk"
    first, second = loads_of(engine)
    for span, image in ((first, B), (second, A)):
        assert left_out(span) == set(order_of(engine, image)[:MIN_SAMPLES])


@pytest.mark.parametrize("own", [None, 0.4])
def test_an_audit_repeats_the_choice_of_its_request(make_engine: MakeEngine, own: float | None) -> None:
    """With the policy and ratio of the engine, and with those of the request."""
    engine = make_engine(audit_fraction=1.0, policy="shifted", max_batched_tokens=256)
    show(engine)
    (answer,) = engine.ask(Ask([*text("before", 9), *PROMPT], ratio=own, policy="shifted"))
    (job,) = (job for output in engine.steps for job in output.kv_connector_metadata.audits)
    asked, audited = loads_of(engine), job.piece.spans
    assert reused(answer) > 0 and [span.reused for span in audited] == [span.reused for span in asked]
    for span, image in zip(audited, (B, A), strict=True):
        assert left_out(span) == set(order_of(engine, image)[: len(left_out(span))])
