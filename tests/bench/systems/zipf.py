"""Throughput and time to first token under a workload with popular and less popular pictures.

Prompts have one to three pictures, drawn from a Zipf distribution, in random order behind fresh text, so that vLLM's
prefix cache never helps. A fixed number of clients ask one request after the other, through vLLM's asynchronous engine
with its engine core in a process of its own. The same requests are asked in mode "off" (plain vLLM, with its caches of
prefixes and of encoder outputs) and with reuse. Every run starts with all caches empty, except vLLM's cache of
preprocessed pictures, which is filled for both; so the first time that a picture comes is a miss, and fewer distinct
pictures give a higher share of reused tokens.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench.engine import CONNECTOR, PLACEHOLDER, VariantError
from bench.results import ROOT, say
from bench.systems.engines import ENGINE, Picture
from bench.systems.records import Budget
from checkpoints import cached_checkpoint

MODEL: dict[str, Any] = {"hidden": 384, "layers": 6, "vision_hidden": 256, "vision_depth": 4}
SIZE = (24, 25)  # of a picture, in tokens
EXPONENT = 1.0
NUM_TOKENS = 4  # of an answer
VARIANTS = ("off", "reuse")
WORDS = ("river", "stone", "paper", "light", "window", "garden", "number", "silver", "morning", "answer")
ALLOWED = {None, "miss", "behind_new_image", "no_gain", "mode"}  # reasons for no reuse that a workload may have


@dataclass(frozen=True, slots=True)
class Load:
    num_pictures: int
    concurrency: int
    num_requests: int


LOADS = [Load(24, 1, 40), Load(24, 4, 40), Load(24, 16, 40), Load(6, 4, 40), Load(72, 4, 40)]
QUICK_LOADS = [Load(4, 1, 8), Load(4, 4, 16), Load(12, 4, 16)]


@dataclass(frozen=True, slots=True)
class Request:
    text: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    first_s: float
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One load in one variant."""

    num_pictures: int
    concurrency: int
    num_requests: int
    mode: str
    repeat: int
    requests_per_s: float
    first_p50_s: float
    first_p90_s: float
    first_longest_s: float  # requests are too few for a p99
    num_image_tokens: int
    reused_share: float  # of the image tokens of all requests
    reasons: dict[str, int]


def requests_of(load: Load, seed: int) -> list[Request]:
    dice = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, load.num_pictures + 1) ** EXPONENT
    requests = []
    for number in range(load.num_requests):
        count = int(dice.integers(1, 4))
        chosen = dice.choice(load.num_pictures, count, replace=False, p=weights / weights.sum())
        fresh = " ".join(dice.choice(WORDS, 12))
        shown = " and ".join([PLACEHOLDER] * count)
        text = f"<|im_start|>user\nRequest {number} of {seed}: {fresh}. {shown}What do they show?<|im_end|>\n"
        requests.append(Request(f"{text}<|im_start|>assistant\n", tuple(Picture(*SIZE, int(one)) for one in chosen)))
    return requests


class Traffic:
    """Clients of one asynchronous engine."""

    def __init__(self, engine: Any, pictures: Mapping[Picture, Any]) -> None:
        self._engine = engine
        self._pictures = pictures
        self._number = 0

    async def ask(self, request: Request, mode: str) -> Answered:
        from vllm import SamplingParams

        self._number += 1
        extra = {"kv_transfer_params": {"vlcache": {"mode": mode}}}
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, extra_args=extra)
        images = [self._pictures[one] for one in request.pictures]
        prompt = {"prompt": request.text, "multi_modal_data": {"image": images}}
        start = time.perf_counter()
        first_s = output = None
        async for output in self._engine.generate(prompt, sampling, f"zipf-{self._number}"):  # noqa: B007
            first_s = first_s or time.perf_counter() - start
        assert first_s is not None and output is not None
        return Answered(first_s, output.kv_transfer_params["vlcache"])

    async def fill_processor_cache(self) -> None:
        for picture in self._pictures:
            await self.ask(Request(f"<|im_start|>user\n{PLACEHOLDER}", (picture,)), "off")

    async def forget_all(self) -> None:
        """vLLM's caches and the connector's entries."""
        if not await self._engine.reset_prefix_cache(reset_connector=True):
            raise VariantError("vLLM could not reset its prefix cache: a request still holds blocks")
        await self._engine.reset_encoder_cache()

    async def run(self, load: Load, mode: str, repeat: int) -> Run:
        requests = requests_of(load, repeat)
        await self.forget_all()
        waiting = iter(requests)
        start = time.perf_counter()
        answers = await asyncio.gather(*(self._client(waiting, mode) for _ in range(load.concurrency)))
        elapsed_s = time.perf_counter() - start
        return summary(load, mode, repeat, elapsed_s, [answer for client in answers for answer in client], requests)

    async def _client(self, waiting: Iterator[Request], mode: str) -> list[Answered]:
        return [await self.ask(request, mode) for request in waiting]


def summary(
    load: Load, mode: str, repeat: int, elapsed_s: float, answers: Sequence[Answered], requests: Sequence[Request]
) -> Run:
    """Raises `VariantError` when the answers are not those of the mode."""
    reasons = Counter(answer.report.get("reason") for answer in answers)
    if not reasons.keys() <= (ALLOWED if mode == "reuse" else {"mode"}):
        raise VariantError(f"{load}, {mode}: {dict(reasons)}")
    num_reused = sum(answer.report["reused_tokens"] for answer in answers)
    if (num_reused > 0) != (mode == "reuse"):
        raise VariantError(f"{load}, {mode}: {num_reused} tokens were reused")
    num_image_tokens = sum(one.num_tokens for request in requests for one in request.pictures)
    firsts = sorted(answer.first_s for answer in answers)
    return Run(
        **asdict(load),
        mode=mode,
        repeat=repeat,
        requests_per_s=len(answers) / elapsed_s,
        first_p50_s=statistics.median(firsts),
        first_p90_s=float(np.quantile(firsts, 0.9)),
        first_longest_s=firsts[-1],
        num_image_tokens=num_image_tokens,
        reused_share=num_reused / num_image_tokens,
        reasons={str(reason): count for reason, count in reasons.items()},
    )


def told(run: Run) -> str:
    return (
        f"{run.num_pictures} pictures, {run.concurrency} clients, {run.mode}: {run.requests_per_s:.2f} requests/s, "
        f"first token {run.first_p50_s:.2f} s, p90 {run.first_p90_s:.2f} s, {run.reused_share:.0%} reused"
    )


def start(num_pictures: int) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    checkpoint = cached_checkpoint("qwen2_5_vl", root=ROOT / ".checkpoints", **MODEL)
    options = ENGINE | {
        "hf_overrides": {"vision_config": {"fullatt_block_indexes": [MODEL["vision_depth"] - 1]}},
        "enable_mm_processor_stats": False,
        "max_model_len": 4096,
        "max_num_batched_tokens": 4096,
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        "mm_processor_cache_gb": 2,
        "kv_transfer_config": CONNECTOR,
    }
    say(f"the asynchronous engine starts, {num_pictures} pictures")
    return AsyncLLM.from_engine_args(AsyncEngineArgs(str(checkpoint), **options))


def measure(is_quick: bool, budget: Budget) -> dict[str, Any]:
    """{"model": sizes, "runs": [...]}."""
    loads = QUICK_LOADS if is_quick else LOADS
    context = get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, loads, 1 if is_quick else 2, budget))
    process.start()
    theirs.close()
    try:
        found = pipe.recv()
    except EOFError as error:
        raise RuntimeError("the process of the workload is gone; its last words are above") from error
    finally:
        process.join()
    if isinstance(found, Exception):
        raise found
    runs, budget.left_out = found
    return {"model": MODEL, "runs": [asdict(run) for run in runs]}


def _serve(pipe: Connection, loads: Sequence[Load], repeats: int, budget: Budget) -> None:
    """A process of its own, which ends here: vLLM's asynchronous engine complains when an interpreter ends."""
    try:
        pipe.send((asyncio.run(_measure(loads, repeats, budget)), budget.left_out))
    except (VariantError, RuntimeError) as error:
        pipe.send(error)
    sys.stdout.flush()
    os._exit(0)


async def _measure(loads: Sequence[Load], repeats: int, budget: Budget) -> list[Run]:
    pictures = [Picture(*SIZE, number) for number in range(max(load.num_pictures for load in loads))]
    engine = start(len(pictures))
    runs: list[Run] = []
    try:
        traffic = Traffic(engine, {picture: picture.pixels() for picture in pictures})
        await traffic.fill_processor_cache()
        await traffic.run(Load(3, 1, 4), "reuse", 99)  # the first reuse warms up
        last_s = 0.0
        for repeat in range(repeats):
            for load in loads:
                if not budget.allows(f"{load}, repeat {repeat + 1}", last_s):
                    continue
                begun = time.monotonic()
                for mode in VARIANTS if repeat % 2 == 0 else VARIANTS[::-1]:
                    runs.append(await traffic.run(load, mode, repeat))
                    say(f"  {told(runs[-1])}")
                last_s = time.monotonic() - begun
    finally:
        engine.shutdown()
    return runs
