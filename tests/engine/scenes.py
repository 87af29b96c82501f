"""What the tests of the fake engine share: a few images, an engine that knows them, and faults to plant."""

from collections.abc import Sequence

from engine.fake_engine import Answer, FakeEngine
from engine.fake_prompts import Ask, Image, text

A, B, C = Image("A", 21), Image("B", 12), Image("C", 9)
OPEN, BETWEEN, CLOSE = text("open", 6), text("between", 5), text("close", 4)
PROMPT: Sequence[int | Image] = [*OPEN, B, *BETWEEN, A, *CLOSE]


def show(engine: FakeEngine, *images: Image, salt: str | None = None) -> None:
    """Let the engine learn images one by one."""
    for image in images or (A, B, C):
        engine.ask(Ask([*text("show", 3), image, *CLOSE], salt=salt, max_tokens=1))
    engine.forget()


def set_prices(engine: FakeEngine, **seconds: float) -> None:
    """Let the engine believe that a token of these kinds of work costs so much."""
    for kind, per_token in seconds.items():
        for _ in range(8):
            engine.session.prices.add(kind, 1, per_token)


def counts(engine: FakeEngine) -> dict[str, float]:
    engine.session.counters.take()
    return dict(engine.counts)


def reused(answer: Answer) -> int:
    return int(answer.report.get("reused_tokens", 0))


def steps_of(engine: FakeEngine, ask: Ask) -> int:
    """How many steps an engine makes that is asked nothing else."""
    before = len(engine.steps)
    engine.ask(ask)
    engine.forget()
    return len(engine.steps) - before


def fail(engine: FakeEngine, stage: str, rank: int, times: int = 1, after: int = 0) -> None:
    """Let jobs of one stage fail on one rank: `times` of them, after so many that succeed."""
    seen = 0

    def is_struck(at: str, on: int, request_id: str) -> bool:
        nonlocal seen
        if (at, on) != (stage, rank):
            return False
        seen += 1
        return after < seen <= after + times

    engine.is_struck = is_struck


def drop_entries(engine: FakeEngine, kind: str = "") -> None:
    """Evict what is not pinned, as room for new entries does; KV takes fewer bytes here than embeddings."""
    index, layout = engine.session.index, engine.session.layout
    for entry in list(index._entries.values()):
        is_kv = entry.extent.nbytes < layout.embedding_nbytes(entry.num_tokens)
        if entry.pins == 0 and kind in ("", "kv" if is_kv else "embedding"):
            index._remove(entry)
