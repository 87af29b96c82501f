"""What the connector costs a picture that nobody has seen, and the request behind it: target 1.

Two engines at a time, each in a process of its own: vLLM without any connector, and with ours. In each round both get
the same new picture, and right behind its answer a request of text; ours gets another such picture in mode "off" as
well. Who begins changes from round to round. While one is asked the other must be idle, which is checked by the time
that its process spends on the CPUs.

    cold over plain     saving included: it is done behind the forward, before the first token is sampled
    text behind it      the same for the request of text, which waits for whatever a save leaves to do
    off over plain      what the two processes differ by when the connector does nothing
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bench.engine import Engine, Measured, VariantError
from bench.results import say
from bench.systems.engines import Picture, Process, Prompt, System, about, forget, ours, started
from bench.systems.records import PLAIN, Budget
from bench.systems.sizes import OPENING, ROOM_FOR_TEXT, expect, expect_plain

SIZE, QUICK_SIZE = (52, 32), (32, 32)
ROUNDS, QUICK_ROUNDS = 12, 3  # 12: each order three times
NUM_TEXT_TOKENS = 200
COLD, OFF = "cold", "off"
OTHERS = 300  # beyond the numbers of the pictures that both engines get
BEHIND = ", text behind it"
REST_S = 0.4  # before each question: threads of the engine that was asked last stop spinning
MOST_BUSY = 0.05  # of the time of a question, that the other engine may be on the CPUs


def measure(is_quick: bool, budget: Budget) -> dict[str, Any]:
    """{"num_tokens", "rounds": [{variant: seconds}], "busy": the largest share, "answers": those of the first round}"""
    size, num_rounds = (QUICK_SIZE, QUICK_ROUNDS) if is_quick else (SIZE, ROUNDS)
    most = size[0] * size[1] + ROOM_FOR_TEXT
    with started(System("vLLM, beside"), most) as plain, started(ours("vlcache, beside"), most) as connected:
        pair = Pair(plain, connected)
        pair.round(size, 0)  # warms up
        rounds: list[dict[str, Measured]] = []
        pair.most_busy = last_s = 0.0
        for number in range(num_rounds):
            if not budget.allows(f"cold, round {number + 1}", last_s):
                break
            start = time.monotonic()
            rounds.append(pair.round(size, 1 + number))
            last_s = time.monotonic() - start
            say(f"  cold, round {number + 1}: {_told(rounds[-1])}")
        require_saved(connected, num_rounds=1 + len(rounds))
    return {
        "num_tokens": size[0] * size[1],
        "rounds": [{name: one.engine_s for name, one in answers.items()} for answers in rounds],
        "busy": pair.most_busy,
        "answers": {name: asdict(one) for name, one in rounds[0].items()},
    }


class Pair:
    """Two engines that are never at work at the same time."""

    def __init__(self, plain: Process, connected: Process) -> None:
        self._plain, self._connected = plain, connected
        self.most_busy = 0.0

    def round(self, size: tuple[int, int], number: int) -> dict[str, Measured]:
        """`number` was in no round before."""
        new, other = about(OPENING, Picture(*size, number)), about(OPENING, Picture(*size, number + OTHERS))
        found: dict[str, Measured] = {}

        def plain() -> None:
            found.update(self._ask(self._plain, new, None, PLAIN))

        def cold() -> None:
            found.update(self._ask(self._connected, new, {"mode": "reuse"}, COLD))

        def off() -> None:
            found.update(self._ask(self._connected, other, {"mode": "off"}, OFF))

        orders = ((plain, cold, off), (cold, plain, off), (off, plain, cold), (off, cold, plain))
        for asking in orders[number % len(orders)]:
            asking()
        require_meaning(found)
        return found

    def _ask(
        self, process: Process, prompt: Prompt, vlcache: Mapping[str, Any] | None, name: str
    ) -> dict[str, Measured]:
        text = random.Random(f"{prompt}").choices(range(300, 2000), k=NUM_TEXT_TOKENS)
        other = self._plain if process is self._connected else self._connected
        process.call(forget)
        time.sleep(REST_S)
        before, start = other.call(cpu_seconds), time.perf_counter()
        first, behind = process.call(ask_both, prompt, text, vlcache)
        elapsed_s = time.perf_counter() - start
        self.most_busy = max(self.most_busy, (other.call(cpu_seconds) - before) / elapsed_s)
        if self.most_busy > MOST_BUSY:
            raise VariantError(f"the other engine was busy for {self.most_busy:.1%} of the time")
        return {name: first, name + BEHIND: behind}


def require_meaning(found: Mapping[str, Measured]) -> None:
    for name in (PLAIN, COLD, OFF):
        expect_plain(found[name])
        behind = found[name + BEHIND]
        is_text = behind.num_prompt_tokens == NUM_TEXT_TOKENS and behind.num_cached_tokens == behind.encoder_runs == 0
        expect(is_text, "not a new text", behind)
    expect(found[COLD].accounting["reason"] == "miss", "the picture was known", found[COLD])


def require_saved(process: Process, num_rounds: int) -> None:
    """Raises `VariantError` unless each picture left its entries: then saving was part of what was measured."""
    num_saved = process.call(num_kv_entries)
    if num_saved != num_rounds:
        raise VariantError(f"{num_saved} entries of {num_rounds} pictures were saved")


def _told(found: Mapping[str, Measured]) -> str:
    return ", ".join(f"{name} {1e3 * one.engine_s:.0f}" for name, one in found.items()) + " ms"


# -- in the engine's process ------------------------------------------------------------------------------------------


def ask_both(llm: Any, prompt: Prompt, text: list[int], vlcache: Mapping[str, Any] | None) -> tuple[Measured, Measured]:
    engine = Engine(llm)
    first = engine.ask(prompt.text, [one.pixels() for one in prompt.pictures], vlcache)
    return first, engine.ask(text, [], vlcache)


def cpu_seconds(llm: Any) -> float:
    return time.process_time()


def num_kv_entries(llm: Any) -> int:
    from e2e import inside

    return inside.num_kv_entries(llm)
