"""Where the time of a hit goes, beside an exact prefix hit of the same prompt.

Within each repeat an exact hit and hits at two ratios, all timed piece by piece. A hit takes two steps of the engine:
one without a forward, in which the connector loads and recomputes, and one that computes the rest of the prompt.
Afterwards one hit of each kind is profiled, which is slower: only the shares of its pass are taken from that.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.engine import Measured
from bench.results import say
from bench.systems.engines import Picture, Process, about, ask, forget, num_threads, ours, started
from bench.systems.laps import CONNECTOR, LOAD, RECOMPUTE, install, pass_shares, timed
from bench.systems.records import EXACT, Budget, reuse
from bench.systems.sizes import OPENING, OTHER_OPENING, ROOM_FOR_TEXT, expect, expect_exact

CASES = ((52, 32), (64, 64))
RATIOS = (0.02, 0.05)
REPEATS = 5


def measure(is_quick: bool, budget: Budget) -> dict[str, Any]:
    """{"threads", "hits": [{"num_tokens", "variant", "seconds", "parts", "pass", "facts"}]}

    Seconds by part, medians over repeats; shares of a pass.
    """
    cases = CASES[:1] if is_quick else CASES
    hits: list[dict[str, Any]] = []
    most = max(columns * rows for columns, rows in cases)
    with started(ours("vlcache parts"), most + ROOM_FOR_TEXT) as process:
        process.call(install)
        threads = process.call(num_threads)
        for size in cases:
            if budget.allows(f"{size[0] * size[1]} tokens", 10.0 if hits else 0.0):
                hits += _case(process, Picture(*size, 0), 2 if is_quick else REPEATS)
    return {"threads": threads, "hits": hits}


def _case(process: Process, picture: Picture, repeats: int) -> list[dict[str, Any]]:
    prompt = about(OPENING, picture)
    process.call(ask, about(OTHER_OPENING, picture), {"mode": "reuse"})
    found: dict[str, list[tuple[Measured, dict[str, float]]]] = {}
    for repeat in range(repeats + 1):
        process.call(forget)
        process.call(ask, prompt, {"mode": "exact"})
        hits = {EXACT: process.call(timed, prompt, {"mode": "off"})}
        for ratio in RATIOS:
            process.call(forget)
            hits[reuse(ratio)] = process.call(timed, prompt, _reuse(ratio))
        _require_meaning(hits)
        if repeat > 0:  # the first one warms up
            for name, hit in hits.items():
                found.setdefault(name, []).append(hit)
    shares = {reuse(ratio): process.call(pass_shares, prompt, _reuse(ratio)) for ratio in RATIOS}
    rows = []
    for name, repeated in found.items():
        parts = {part: statistics.median(seconds[part] for _, seconds in repeated) for part in repeated[0][1]}
        seconds = statistics.median(measured.engine_s for measured, _ in repeated)
        say(f"  {picture.num_tokens} tokens, {name}: {1e3 * seconds:.0f} ms")
        rows.append(
            {
                "num_tokens": picture.num_tokens,
                "variant": name,
                "seconds": seconds,
                "parts": parts,
                "pass": shares.get(name, {}),
                "facts": repeated[0][0].accounting,
            }
        )
    return rows


def _reuse(ratio: float) -> dict[str, Any]:
    return {"mode": "reuse", "recompute_ratio": ratio}


def _require_meaning(hits: dict[str, tuple[Measured, dict[str, float]]]) -> None:
    for name, (measured, seconds) in hits.items():
        if name == EXACT:
            expect_exact(measured)
            expect(seconds[RECOMPUTE] == seconds[LOAD] == 0, "an exact hit recomputes nothing", measured)
        else:
            expect(measured.accounting["reused_tokens"] > 0 and measured.encoder_runs == 0, "nothing reused", measured)
            expect(seconds[RECOMPUTE] > 0 and seconds[CONNECTOR] > 0, "the pass was not seen", measured)
        expect(0.8 < sum(seconds.values()) / measured.engine_s < 1.2, "the parts are not the whole", measured)
