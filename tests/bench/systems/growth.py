"""With a fixed budget of recomputed tokens, does a hit get dearer by more than the copying of its KV does?

Each size of picture is known to one engine, whose option `recompute_tokens` bounds the recomputed tokens. In each
repeat, for every size:

    hit     caches empty, KV and encoder output from the host tier; engine time to the first token
    again   the same prompt again, now in vLLM's prefix cache: what vLLM's own hit takes
    copy    PyTorch's copy of the entry's keys and values, out of the host tier, by as many threads as the engine has;
            neither side is in the processor's caches

The growth of each, from the smallest size to size n, is the difference of its two times within a repeat; the target is
that the growth of the hit is no more than that of the copy. A hit of a larger picture also has more keys that its
recomputed tokens and the engine's forward must attend to, and more rows that follow what the samples show: how the
growth divides is told from the medians of its parts and from one profiled hit of each size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.engine import Measured
from bench.results import say
from bench.systems.engines import Picture, Process, about, ask, forget, num_threads, ours, started
from bench.systems.laps import ATTENTION, PARTS, PASS_PARTS, RECOMPUTE, install, pass_shares, timed
from bench.systems.records import Budget
from bench.systems.sizes import BUDGET_TOKENS, OPENING, OTHER_OPENING, ROOM_FOR_TEXT, SLACK, expect

SIZES, QUICK_SIZES = ((32, 32), (64, 32), (64, 64), (128, 64)), ((16, 16), (32, 32))
REPEATS, QUICK_REPEATS = 10, 3
HIT, AGAIN, COPY = "hit", "again", "copy"
IN_PASS = {f"{RECOMPUTE}: {part}": part for part in PASS_PARTS}  # name as a part of the hit -> of the pass
PASS_ATTENTION = f"{RECOMPUTE}: {ATTENTION}"
REUSE = {"mode": "reuse", "recompute_ratio": 1.0}  # the budget is less than that
FLUSHED_NBYTES = 256 << 20  # written before each copy: more than the processor's caches hold


def measure(is_quick: bool, budget: Budget) -> dict[str, Any]:
    """{"budget_tokens", "threads", "sizes": [{"num_tokens", "nbytes", "seconds", "parts", "facts"}]}

    Seconds by repeat of `HIT`, `AGAIN` and `COPY`; parts of a hit are medians, those of its pass in place of that.
    """
    sizes, repeats = (QUICK_SIZES, QUICK_REPEATS) if is_quick else (SIZES, REPEATS)
    pictures = [Picture(*size, 0) for size in sizes]
    system = ours("vlcache growth", recompute_tokens=BUDGET_TOKENS)
    repeated: list[list[Once]] = []
    with started(system, max(one.num_tokens for one in pictures) + ROOM_FOR_TEXT) as process:
        process.call(install)
        for picture in pictures:
            process.call(ask, about(OTHER_OPENING, picture), {"mode": "exact"})
        last_s = 0.0
        for repeat in range(-1, repeats):  # the first one warms up
            if not budget.allows(f"growth, repeat {repeat + 1}", last_s):
                break
            start = time.monotonic()
            times = [_once(process, picture) for picture in pictures]
            last_s = time.monotonic() - start
            if repeat >= 0:
                repeated.append(times)
        shares = [process.call(pass_shares, about(OPENING, picture), REUSE) for picture in pictures]
        threads = process.call(num_threads)
        nbytes = [process.call(kv_nbytes, picture.num_tokens) for picture in pictures]
    rows = []
    for number, picture in enumerate(pictures):
        of_size = [times[number] for times in repeated]
        seconds = {name: [once.seconds[name] for once in of_size] for name in (HIT, AGAIN, COPY)}
        told = ", ".join(f"{name} {1e3 * statistics.median(values):.1f}" for name, values in seconds.items())
        say(f"  growth, {picture.num_tokens} tokens: {told} ms")
        rows.append(
            {
                "num_tokens": picture.num_tokens,
                "nbytes": nbytes[number],
                "seconds": seconds,
                "parts": _parts([once.parts for once in of_size], shares[number]),
                "facts": of_size[0].report,
            }
        )
    return {"budget_tokens": BUDGET_TOKENS, "threads": threads, "sizes": rows}


@dataclass(frozen=True, slots=True)
class Once:
    seconds: dict[str, float]
    parts: dict[str, float]  # of the hit
    report: dict[str, Any]


def _once(process: Process, picture: Picture) -> Once:
    prompt = about(OPENING, picture)
    process.call(forget)
    hit, parts = process.call(timed, prompt, REUSE)
    again: Measured = process.call(ask, prompt, REUSE)
    report = hit.accounting
    expect(report["reused_tokens"] >= picture.num_tokens - BUDGET_TOKENS - SLACK, "too little was reused", hit)
    expect(hit.encoder_runs == 0 and parts[RECOMPUTE] > 0, "no hit", hit)
    is_cached = again.accounting["prefix_cached_tokens"] >= picture.num_tokens
    expect(is_cached and again.accounting["recomputed_tokens"] == 0, "not from the prefix cache", again)
    copied_s = process.call(copy_seconds, picture.num_tokens)
    return Once({HIT: hit.engine_s, AGAIN: again.engine_s, COPY: copied_s}, parts, report)


def _parts(hits: Sequence[Mapping[str, float]], shares: Mapping[str, float]) -> dict[str, float]:
    medians = {part: statistics.median(hit[part] for hit in hits) for part in PARTS}
    whole_pass = medians.pop(RECOMPUTE)
    return medians | {name: shares[part] * whole_pass for name, part in IN_PASS.items()}


# -- in the engine's process ------------------------------------------------------------------------------------------


def _kv(llm: Any, num_tokens: int) -> Any:
    """Keys and values of the entry of this size, a view of the slab."""
    from e2e import inside

    session = inside.session(llm)
    (entry,) = (
        entry
        for entry in session.index._entries.values()
        if entry.num_tokens == num_tokens and entry.entry_class.kind == "kv"
    )
    return inside.worker(llm)._session.slab.kv(entry.extent, num_tokens)


def kv_nbytes(llm: Any, num_tokens: int) -> int:
    return int(_kv(llm, num_tokens).nbytes)


def copy_seconds(llm: Any, num_tokens: int) -> float:
    import torch

    source = _kv(llm, num_tokens)
    copy = torch.zeros_like(source)
    torch.ones(FLUSHED_NBYTES, dtype=torch.uint8)
    start = time.perf_counter()
    copy.copy_(source)
    return time.perf_counter() - start
