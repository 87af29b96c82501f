"""Prompts with several known pictures, each of which was seen alone before.

Orders: two, four or eight of them in an order and behind text that are new each time. In each repeat

    plain               mode "off", vLLM's caches empty: encoder and prefill
    exact hit           mode "off", the same prompt again: the limit of what any cache can do
    plain, encoded      mode "off", with vLLM's cache of encoder outputs full: what vLLM itself brings to a new order
    reuse 0-5 %         caches empty again, KV and encoder outputs from the host tier

Turns: a chat whose turns bring one more known picture each. It is held in mode "off", with vLLM's prefix cache, where
each turn is asked twice (`plain`, `exact hit`), and with reuse, where a turn finds the chat's own approximate blocks.
All begin with empty caches; who begins changes from repeat to repeat. One engine for all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from bench.engine import PLACEHOLDER, Measured
from bench.results import say
from bench.systems.engines import Picture, Process, Prompt, about, ask, forget, forget_prefixes, ours, started
from bench.systems.records import EXACT, PLAIN, Budget, Record, reuse
from bench.systems.sizes import OPENING, SLACK, expect, expect_exact, expect_plain

SIZES = ((16, 16), (24, 16), (32, 16))  # of pictures, in tokens, in turns
COUNTS = (2, 4, 8)  # pictures of a prompt
QUICK_COUNTS = (2, 4)
TURN_SIZE = (32, 16)
NUM_TURNS = 4
ENCODED = "plain, encoded"
RATIOS = (0.0, 0.02, 0.05)
TURN_RATIOS = RATIOS[1:]
VARIANTS = (PLAIN, ENCODED, EXACT, *map(reuse, RATIOS))
ROOM_FOR_TEXT = 1024
WARM_UP = 9999  # the number of a repeat that is not kept
# With its question and its picture, a turn adds whole blocks: an exact hit computes as many tokens in each of them.
ANSWER = "There is a good deal to see, most of it near the middle, and some of it is rather hard to make out. " * 2
ANSWER += "That is all there is to say about it now. "

Answers = dict[str, Measured]
Case = tuple[str, int, Answers]  # a title, image tokens, all variants


def fresh(process: Process, prompt: Prompt, **vlcache: Any) -> Measured:
    process.call(forget)
    measured: Measured = process.call(ask, prompt, vlcache)
    return measured


def in_turns(repeat: int, *asking: Callable[[], None]) -> None:
    for one in asking if repeat % 2 == 0 else asking[::-1]:
        one()


def expect_reuse(measured: Measured, pictures: Sequence[Picture], ratio: float) -> None:
    expect(measured.encoder_runs == 0, "the encoder ran", measured)
    least = sum((1 - ratio) * one.num_tokens - SLACK for one in pictures)
    expect(measured.accounting["reused_tokens"] >= least, f"less than {least:.0f} tokens were reused", measured)


def orders(process: Process, pictures: Sequence[Picture], repeat: int) -> list[Case]:
    """These pictures in an order of their own."""
    dice = np.random.default_rng((len(pictures), repeat))
    prompt = about(f"Number {repeat}. {OPENING}", *(pictures[n] for n in dice.permutation(len(pictures))))
    found: Answers = {}

    def plain() -> None:
        found[PLAIN] = fresh(process, prompt, mode="off")
        found[EXACT] = process.call(ask, prompt, {"mode": "off"})
        process.call(forget_prefixes)
        found[ENCODED] = process.call(ask, prompt, {"mode": "off"})

    def reusing() -> None:
        found.update({reuse(r): fresh(process, prompt, mode="reuse", recompute_ratio=r) for r in RATIOS})

    in_turns(repeat, plain, reusing)
    encoded = found[ENCODED]
    expect_plain(found[PLAIN])
    expect_exact(found[EXACT])
    expect(encoded.encoder_runs == 0 and encoded.num_cached_tokens == 0, "not from the encoder cache alone", encoded)
    for ratio in RATIOS:
        expect_reuse(found[reuse(ratio)], prompt.pictures, ratio)
    return [(f"{len(pictures)} pictures", prompt.num_image_tokens, found)]


def prompts_of(pictures: Sequence[Picture], opening: str) -> list[Prompt]:
    """Of each turn: all turns so far."""
    prompts, text = [], ""
    for number in range(len(pictures)):
        start = "Here is one more. " if number else opening
        text += f"<|im_start|>user\n{start}{PLACEHOLDER}What is new in this one?<|im_end|>\n<|im_start|>assistant\n"
        prompts.append(Prompt(text, tuple(pictures[: number + 1])))
        text += f"{ANSWER}<|im_end|>\n"
    return prompts


def turns(process: Process, pictures: Sequence[Picture], repeat: int) -> list[Case]:
    """A chat about these pictures; image tokens are those so far."""
    prompts = prompts_of(pictures, f"Chat {repeat}. {OPENING}")
    found: list[Answers] = [{} for _ in prompts]

    def plain() -> None:
        process.call(forget)
        for turn, prompt in zip(found, prompts, strict=True):
            turn.update({name: process.call(ask, prompt, {"mode": "off"}) for name in (PLAIN, EXACT)})

    def reusing() -> None:
        for ratio in TURN_RATIOS:
            process.call(forget)
            for turn, prompt in zip(found, prompts, strict=True):
                turn[reuse(ratio)] = process.call(ask, prompt, {"mode": "reuse", "recompute_ratio": ratio})

    in_turns(repeat, plain, reusing)
    for number, (turn, prompt) in enumerate(zip(found, prompts, strict=True)):
        expect_exact(turn[EXACT])
        known = turn[PLAIN].accounting["prefix_cached_tokens"]
        expect(turn[PLAIN].encoder_runs == 1 and (known > 0) == (number > 0), "no turn of plain vLLM", turn[PLAIN])
        for ratio in TURN_RATIOS:
            expect_reuse(turn[reuse(ratio)], prompt.pictures[-1:], ratio)
            prefix = turn[reuse(ratio)].accounting["prefix_cached_tokens"]
            expect(prefix == known, f"not {known} tokens of the turns before", turn[reuse(ratio)])
    sizes = [prompt.num_image_tokens for prompt in prompts]
    return [(f"turn {n}", *case) for n, case in enumerate(zip(sizes, found, strict=True), start=1)]


# -- all --------------------------------------------------------------------------------------------------------------


class Measurement:
    """Cases by kind, "orders" or "turns", as far as the time allows."""

    def __init__(self, budget: Budget) -> None:
        self.records: dict[str, list[Record]] = {"orders": [], "turns": []}
        self._budget = budget
        self._last_s: dict[str, float] = {}

    def add(self, kind: str, what: str, repeat: int, asking: Callable[[], list[Case]]) -> None:
        if not self._budget.allows(f"{what}, repeat {repeat + 1}", self._last_s.get(what, 0.0)):
            return
        start = time.monotonic()
        for title, num_tokens, found in asking():
            variants = {name: found[name] for name in VARIANTS if name in found}
            times = ", ".join(f"{name} {1e3 * one.engine_s:.0f}" for name, one in variants.items())
            say(f"  {title}, repeat {repeat + 1}: {times} ms")
            for name, one in variants.items():
                self.records[kind].append(Record(title, num_tokens, name, repeat, one.engine_s, asdict(one)))
        self._last_s[what] = time.monotonic() - start


def measure(is_quick: bool, budget: Budget) -> dict[str, Any]:
    """{"orders": [records], "turns": [records]}; the `system` of a record says how many pictures, or which turn."""
    counts, repeats = (QUICK_COUNTS, 1) if is_quick else (COUNTS, 5)
    pictures = [Picture(*SIZES[number % len(SIZES)], number) for number in range(max(counts))]
    shown = [Picture(*TURN_SIZE, 100 + number) for number in range(NUM_TURNS)]
    measurement = Measurement(budget)
    most = max(sum(one.num_tokens for one in of) for of in (pictures, shown)) + ROOM_FOR_TEXT
    with started(ours("vlcache mixed"), most) as process:
        for picture in pictures + shown:
            expect_plain(fresh(process, about("", picture), mode="exact"))
        orders(process, pictures[:2], WARM_UP)
        turns(process, shown, WARM_UP)
        for repeat in range(repeats):
            for count in counts:
                asking = partial(orders, process, pictures[:count], repeat)
                measurement.add("orders", f"{count} pictures", repeat, asking)
            measurement.add("turns", "chat", repeat, partial(turns, process, shown, repeat))
    return {kind: [asdict(record) for record in records] for kind, records in measurement.records.items()}
