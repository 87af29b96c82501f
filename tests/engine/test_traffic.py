"""Random traffic: whatever happens in whatever order, every answer is right and nothing is left over.

The workers of the fake engine check each read; see `fake_worker`.
"""

import random
from dataclasses import dataclass
from typing import Any

import pytest

from engine.conftest import MakeEngine
from engine.fake_engine import FakeEngine
from engine.fake_prompts import Ask, Frames, Image, text

IMAGES = [Image(f"traffic {number}", num_tokens) for number, num_tokens in enumerate([4, 6, 9, 13, 17, 24, 30, 41])]
IMAGES += [Frames("traffic", 27, seconds=seconds) for seconds in (1, 2)]


@dataclass(slots=True)
class Weather:
    """How often requests arrive, per step, and what goes wrong, per step or job."""

    arrivals: float = 0.3
    abort: float = 0.02
    preempt: float = 0.02
    reset: float = 0.004
    new_weights: float = 0.002
    lost_piece: float = 0.04
    lost_save: float = 0.04
    lost_audit: float = 0.3


def random_ask(rng: random.Random) -> Ask:
    """Few images and videos, tenants and settings, so that they recur; half of the beginnings do, too. No ratio is one
    that the engine may choose by itself: the two would share their blocks, and workers could not tell them apart.
    """
    beginning = rng.choice([0, 1, rng.random(), rng.random()])
    parts: list[int | Image] = [*text(beginning, rng.choice([0, 3, 8]))]
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4])):
        parts += [rng.choice(IMAGES), *text(rng.randrange(3), rng.choice([0, 1, 2, 7]))]
    parts += text(rng.randrange(3), rng.choice([1, 4, 11]))
    mode, ratio = rng.choice(["reuse", "reuse", "reuse", "exact", "off"]), rng.choice([None, 0.0, 0.06, 0.45, 1.0])
    salt, policy = rng.choice([None, None, "a tenant"]), rng.choice(["leading", "shifted"])
    return Ask(parts, mode, ratio, salt, rng.choice([1, 2, 6, 15]), policy)


def live(engine: FakeEngine) -> list[str]:
    return [name for name, request in engine.scheduler.requests.items() if not request.is_finished()]


def drive(engine: FakeEngine, rng: random.Random, num_requests: int, weather: Weather) -> set[str]:
    """Returns the requests that were aborted."""
    chances = {"piece": weather.lost_piece, "embedding": weather.lost_piece, "audit": weather.lost_audit}
    engine.are_copies_done = lambda: rng.random() < 0.5
    engine.is_struck = lambda stage, rank, request_id: rng.random() < chances.get(stage, weather.lost_save)
    aborted: set[str] = set()
    num_steps = 0
    while len(engine.truths) < num_requests or engine.has_work:
        if len(engine.truths) < num_requests and rng.random() < weather.arrivals:
            for _ in range(rng.choice([1, 1, 1, 4])):
                engine.add(random_ask(rng))
        if (names := live(engine)) and rng.random() < weather.abort:
            aborted.add(name := rng.choice(names))
            rng.choice([engine.abort, engine.abort_during_step])(name)
        running = [request.request_id for request in engine.scheduler.running]
        if running and rng.random() < weather.preempt:
            engine.preempt(rng.choice(running))
        if rng.random() < weather.reset:
            engine.scheduler.reset_connector_cache()
        if rng.random() < weather.new_weights:
            engine.change_weights("wait")
        engine.step()
        engine.check()
        num_steps += 1
        assert num_steps < 100 * num_requests, f"no end in sight: {live(engine)}"
    return aborted


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("space", ["roomy", "tight", "entries alone"])
def test_random_traffic_is_answered_and_leaves_nothing_behind(make_engine: MakeEngine, seed: int, space: str) -> None:
    rng = random.Random(seed)
    sizes: dict[str, dict[str, Any]] = {
        "roomy": {"num_blocks": 400, "max_batched_tokens": 64, "host_nbytes": 1 << 20},
        "tight": {"num_blocks": 50, "max_batched_tokens": 12, "host_nbytes": 350_000, "max_requests": 8},
        "entries alone": {"num_blocks": 400, "max_batched_tokens": 64, "entry_context": "alone"},
    }
    engine = make_engine(**sizes[space], keeps_pixels=True)
    # Entries that are computed when the engine is idle need one that sometimes is.
    weather = Weather(arrivals=0.05) if space == "entries alone" else Weather()
    aborted = drive(engine, rng, 150, weather)
    assert {name for name, answer in engine.answers.items() if not answer.is_finished} <= aborted
    assert engine.counts["hits"] > 5
    assert space == "entries alone" or engine.counts["failures:reuse"] > 0  # there, few loads are there to be lost
    assert space != "tight" or engine.counts["evictions:room"] > 0
