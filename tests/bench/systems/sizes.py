"""Time to first token against the size of a picture, for each system that runs here.

Ours, in each repeat with a picture that is new to the engine:

    first time      the connector does not know the picture: it is computed, and stored
    plain           mode "off", other text before it, vLLM's caches empty: encoder and prefill
    exact hit       mode "off", the same prompt again: the limit of what any cache can do
    reuse 0-10 %    caches empty again, KV and encoder output from the host tier
    reuse 2 %, disk the same, with entries on disk only, out of the page cache

What vLLM has of its own: `plain` is the first time there (what it stores is part of it), `same prompt` the same one
when vLLM's prefix and encoder caches were emptied, `new text` the same picture behind other text. Their question is
longer, so that a cache of whole blocks covers the picture.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.engine import Measured, VariantError
from bench.results import say
from bench.systems.engines import (
    Picture,
    Process,
    Prompt,
    System,
    about,
    ask,
    encoder_connector,
    forget,
    kv_connector,
    leave_only_disk,
    num_threads,
    ours,
    reason_of,
    started,
)
from bench.systems.records import EXACT, PLAIN, Budget, Record, reuse

CASES = ((16, 16), (32, 32), (52, 32), (64, 64), (128, 64), (128, 128))
QUICK_CASES = CASES[:2]
OTHERS_CASES = CASES[:4]
ROOM_FOR_TEXT = 512
FEWER_ABOVE = (4000, 10_000)  # tokens of a case above which it is repeated one time less
GROWTH = 1.75  # of a repeat's time with the tokens, as exponent: to guess what still fits
RATIOS = (0.0, 0.02, 0.05, 0.10)
BUDGET_TOKENS = 64
OURS = "vlcache"
OURS_BUDGETED = f"vlcache, {BUDGET_TOKENS} tokens"
RepeatOnce = Callable[[Process, tuple[int, int], int], dict[str, Measured]]
OPENING = "This picture comes behind words that were never in front of it before, and that is all that is new. "
OTHER_OPENING = "The first time it stands behind words that are quite as many as those, and it is not known here yet. "
LONG_QUESTION = "What does it show, what is missing, and what would you change if it were yours to change? " * 5
SLACK = 32  # tokens of a span that may be recomputed besides its ratio: its ends, and the fewest that a policy takes


@dataclass(frozen=True, slots=True)
class Keeps:
    """What a system brings back when vLLM's own caches are empty."""

    kv: bool = False
    encoder: bool = False


def expect(condition: bool, what: str, measured: Measured) -> None:
    if not condition:
        raise VariantError(f"{what}: {measured}")


def expect_plain(measured: Measured) -> None:
    expect(measured.encoder_runs > 0 and measured.num_cached_tokens == 0, "plain came from a cache", measured)


def expect_exact(measured: Measured) -> None:
    is_hit = measured.encoder_runs == 0 and measured.num_cached_tokens >= measured.num_prompt_tokens - 129
    expect(is_hit, "the exact hit was computed", measured)


# -- ours -------------------------------------------------------------------------------------------------------------


def repeat_ours(process: Process, size: tuple[int, int], number: int, folder: Path | None) -> dict[str, Measured]:
    """All variants once. Without a `folder` of the disk tier, the engine has a budget of recomputed tokens."""
    picture = Picture(*size, number)
    prompt, known = about(OPENING, picture), about(OTHER_OPENING, picture)

    def fresh(what: Prompt, **vlcache: Any) -> Measured:
        process.call(forget)
        measured: Measured = process.call(ask, what, vlcache)
        return measured

    found = {}
    for name in ("first time", PLAIN) if number % 2 else (PLAIN, "first time"):
        if name == PLAIN:
            found[PLAIN] = fresh(prompt, mode="off")
            found[EXACT] = process.call(ask, prompt, {"mode": "off"})
        else:
            found[name] = fresh(known, mode="reuse")
    if number == 0:
        fresh(prompt, mode="reuse")  # the first reuse of this size warms up
    for ratio in RATIOS if folder is not None else (1.0,):
        name = reuse(ratio) if folder is not None else f"reuse {BUDGET_TOKENS} tokens"
        found[name] = fresh(prompt, mode="reuse", recompute_ratio=ratio)
    if folder is not None:
        process.call(leave_only_disk, str(folder))
        found[f"{reuse(0.02)}, disk"] = fresh(prompt, mode="reuse", recompute_ratio=0.02)
    require_meaning(found, picture.num_tokens)
    return found


def require_meaning(found: Mapping[str, Measured], num_tokens: int) -> None:
    """Raises `VariantError` when a variant was not what its name says."""
    expect_plain(found["first time"])
    expect_plain(found[PLAIN])
    expect_exact(found[EXACT])
    recomputed = []
    for name, measured in found.items():
        if not name.startswith("reuse"):
            continue
        amount = name.split()[1].rstrip("%,")
        most = BUDGET_TOKENS if name.endswith("tokens") else float(amount) / 100 * num_tokens
        report = measured.accounting
        expect(measured.encoder_runs == 0, "the encoder ran", measured)
        expect(report["reused_tokens"] >= num_tokens - most - SLACK, f"{name}: too little was reused", measured)
        expect(report["tier"] == ("disk" if name.endswith("disk") else "host"), f"{name}: another tier", measured)
        if not name.endswith("disk"):
            recomputed.append(report["recomputed_tokens"])
    expect(recomputed == sorted(recomputed), "larger ratios recompute less", found[PLAIN])


# -- what vLLM has of its own -----------------------------------------------------------------------------------------


def repeat_other(process: Process, size: tuple[int, int], number: int, keeps: Keeps) -> dict[str, Measured]:
    picture = Picture(*size, number)
    prompt = about(OPENING, picture, question=LONG_QUESTION)
    other = about("Here are other words. " + OPENING, picture, question=LONG_QUESTION)

    def fresh(what: Prompt) -> Measured:
        process.call(forget)
        measured: Measured = process.call(ask, what)
        return measured

    found = {PLAIN: fresh(prompt), EXACT: process.call(ask, prompt)}
    expect_plain(found[PLAIN])
    expect_exact(found[EXACT])
    if keeps == Keeps():
        return found
    found["same prompt"], found["new text"] = again, new = fresh(prompt), fresh(other)
    cached = again.num_cached_tokens >= again.num_prompt_tokens - 129
    expect(cached if keeps.kv else again.num_cached_tokens == 0, "KV of the same prompt", again)
    expect((again.encoder_runs == 0) == (keeps.kv or keeps.encoder), "encoder, same prompt", again)
    expect(new.num_cached_tokens == 0 and (new.encoder_runs == 0) == keeps.encoder, "new text", new)
    return found


def refusal_of(system: System) -> str:
    """Why a system does not run here. Raises `VariantError` when it does: then it belongs to those measured."""
    try:
        with started(replace(system, options={**system.options, "num_gpu_blocks_override": 32}), 1024):
            pass
    except RuntimeError as error:
        return reason_of(error)
    raise VariantError(f"{system.name} starts here: it must be measured")


# -- all --------------------------------------------------------------------------------------------------------------


def measure(is_quick: bool, budget: Budget) -> dict[str, Any]:
    """{"records": [...], "refusals": {system: reason}, "failures": [...]}: what was measured before a failure stays."""
    records: list[Record] = []
    failures: list[str] = []

    def run(system: System, cases: Sequence[tuple[int, int]], repeats: int, repeat: RepeatOnce) -> None:
        try:
            _add_cases(records, system, cases, repeats, repeat, budget)
        except (VariantError, RuntimeError, TimeoutError) as error:
            failures.append(f"{system.name}: {error}")
            say(f"  FAILED, {failures[-1]}")

    with tempfile.TemporaryDirectory(prefix="bench_systems-") as scratch:
        refusals = _refusals()
        cases = QUICK_CASES if is_quick else OTHERS_CASES
        repeats = 1 if is_quick else 2
        kv, encoder = f"{scratch}/example-kv", f"{scratch}/example-encoder"
        others = (
            (System("vLLM alone"), Keeps()),
            (kv_connector("ExampleConnector", shared_storage_path=kv), Keeps(kv=True)),
            (encoder_connector("ECExampleConnector", shared_storage_path=encoder), Keeps(encoder=True)),
        )
        for system, keeps in others:
            run(system, cases, repeats, partial(repeat_other, keeps=keeps))
        fixed = ours(OURS_BUDGETED, recompute_tokens=BUDGET_TOKENS)
        run(fixed, cases, repeats, partial(repeat_ours, folder=None))
        folder = Path(scratch) / "vlcache"
        full = ours(OURS, disk_path=str(folder))
        cases, repeats = (QUICK_CASES, 1) if is_quick else (CASES, 3)
        run(full, cases, repeats, partial(repeat_ours, folder=folder))
    return {"records": [asdict(record) for record in records], "refusals": refusals, "failures": failures}


def _add_cases(
    records: list[Record],
    system: System,
    cases: Sequence[tuple[int, int]],
    repeats: int,
    repeat: RepeatOnce,
    budget: Budget,
) -> None:
    """Each case with all its repeats, as far as the time allows; large ones are repeated less."""
    last_s, last_tokens = 5.0, CASES[0][0] * CASES[0][1]
    most = max(columns * rows for columns, rows in cases)
    with started(system, most + ROOM_FOR_TEXT) as process:
        threads = process.call(num_threads)
        process.call(ask, about("To warm up. ", Picture(16, 16, 9999)), None)
        for size in cases:
            num_tokens = size[0] * size[1]
            for number in range(max(1, repeats - sum(num_tokens > limit for limit in FEWER_ABOVE))):
                what = f"{system.name}, {num_tokens} tokens, repeat {number + 1}"
                if not budget.allows(what, last_s * (num_tokens / last_tokens) ** GROWTH):
                    break
                start = time.monotonic()
                found = repeat(process, size, number)
                last_s, last_tokens = time.monotonic() - start, num_tokens
                times = ", ".join(f"{name} {1e3 * one.engine_s:.0f}" for name, one in found.items())
                say(f"  {what}: {times} ms")
                for name, one in found.items():
                    facts = asdict(one) | {"threads": threads}
                    records.append(Record(system.name, num_tokens, name, number, one.engine_s, facts))


def _refusals() -> dict[str, str]:
    candidates = [
        kv_connector("OffloadingConnector", cpu_bytes_to_use=1 << 30),
        kv_connector("SimpleCPUOffloadConnector", cpu_bytes_to_use=1 << 30),
        encoder_connector("ECCPUConnector", ec_cpu_bytes=1 << 28),
    ]
    with ThreadPoolExecutor(len(candidates)) as threads:
        reasons = list(threads.map(refusal_of, candidates))
    # It asks for another model runner: what comes of that, in an environment that no thread may see.
    asked_for = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    candidates.append(replace(candidates[-1], name="ECCPUConnector, V2 model runner", environment=asked_for))
    reasons.append(refusal_of(candidates[-1]))
    return {system.name: reason for system, reason in zip(candidates, reasons, strict=True)}
