"""LMCache beside vLLM's own prefix cache, on text: `LMCacheMPConnector` with a real `lmcache server`.

It is measured on text only: it has told pictures of the same size apart in recent versions only. One `vllm serve`, and
in each repeat a text that is new to both:

    plain       the first time: computed by the engine; what LMCache stores is part of it
    exact hit   the same prompt again: the limit of what any cache can do
    LMCache     the same prompt after vLLM's prefix cache was emptied

Times are a client's, of an answer of one token.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

from bench.engine import VariantError
from bench.results import ROOT, say
from bench.systems.engines import LOGS, MODEL
from bench.systems.records import EXACT, PLAIN, Budget, Record
from checkpoints import cached_checkpoint
from e2e.lmcache_server import lmcache_server
from e2e.server import Server

CASES = (2048, 8192)
QUICK_CASES = (2048,)
TAIL = 58  # tokens behind those of the case, which are whole chunks
CHUNK_TOKENS = 256
NAME = "LMCacheMPConnector"
KEPT = "LMCache"


def token_ids(num_tokens: int, seed: int) -> list[int]:
    """Of a text that comes with no other seed. An exact hit computes the tail, LMCache's chunks end before it, too."""
    dice = random.Random(seed)
    return [dice.randrange(300, 2000) for _ in range(num_tokens + TAIL)]


@contextmanager
def started(max_tokens: int) -> Iterator[Server]:
    checkpoint = cached_checkpoint("qwen2_5_vl", root=ROOT / ".checkpoints", **MODEL)
    LOGS.mkdir(parents=True, exist_ok=True)
    environment = {"VLLM_SERVER_DEV_MODE": "1", "LMCACHE_TRACK_USAGE": "false", "VLLM_LOGGING_LEVEL": "INFO"}
    with lmcache_server(LOGS / "lmcache.log", CHUNK_TOKENS) as port, patch.dict(os.environ, environment):
        extra = {"lmcache.mp.port": port}
        config = {"kv_connector": NAME, "kv_role": "kv_both", "kv_connector_extra_config": extra}
        limits = ("--max-model-len", str(max_tokens), "--max-num-batched-tokens", str(max_tokens))
        flags = ("--max-num-seqs", "32", "--block-size", "128", "--enforce-eager", "--enable-prompt-tokens-details")
        pictures = ("--skip-mm-profiling", "--limit-mm-per-prompt", '{"image": 1, "video": 0}')
        say(f"`lmcache server` runs; `vllm serve` with {NAME} starts")
        config_flag = ("--kv-transfer-config", json.dumps(config))
        server = Server(checkpoint, LOGS / "text.log", *limits, *flags, *pictures, *config_flag)
        try:
            yield server.wait_until_ready()
        finally:
            server.close()


def ask(server: Server, prompt: list[int]) -> tuple[float, dict[str, int]]:
    """Seconds, and the numbers of tokens: of the prompt, and cached."""
    body = {"model": "tested", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    start = time.perf_counter()
    answer = server.post("/v1/completions", body)
    seconds = time.perf_counter() - start
    usage = answer["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return seconds, {"num_prompt_tokens": usage["prompt_tokens"], "num_cached_tokens": cached}


def repeat_once(server: Server, num_tokens: int, repeat: int) -> list[Record]:
    prompt = token_ids(num_tokens, seed=1000 * num_tokens + repeat)
    server.reset("prefix")
    found = {PLAIN: ask(server, prompt), EXACT: ask(server, prompt)}
    server.reset("prefix")
    found[KEPT] = ask(server, prompt)
    require_meaning({name: facts for name, (_, facts) in found.items()})
    times = ", ".join(f"{name} {1e3 * seconds:.0f}" for name, (seconds, _) in found.items())
    say(f"  {num_tokens} tokens, repeat {repeat + 1}: {times} ms")
    return [Record(NAME, num_tokens, name, repeat, seconds, dict(facts)) for name, (seconds, facts) in found.items()]


def require_meaning(found: dict[str, dict[str, int]]) -> None:
    """Raises `VariantError` when a variant was not what its name says."""
    plain, exact, kept = (found[name]["num_cached_tokens"] for name in (PLAIN, EXACT, KEPT))
    if plain > 0 or not exact == kept == found[PLAIN]["num_prompt_tokens"] - TAIL:
        raise VariantError(f"text: {found}")


def measure(is_quick: bool, budget: Budget) -> dict[str, Any]:
    """{"chunk_tokens", "records": [...]}."""
    cases, repeats = (QUICK_CASES, 1) if is_quick else (CASES, 3)
    records: list[Record] = []
    with started(max(cases) + 2 * TAIL) as server:
        repeat_once(server, cases[0], -1)  # warms up: the first load of LMCache takes longer
        last_s, last_tokens = 0.0, 1
        for num_tokens in cases:
            for repeat in range(repeats):
                if not budget.allows(f"{num_tokens} tokens, repeat {repeat + 1}", last_s * num_tokens / last_tokens):
                    break
                begun = time.monotonic()
                records += repeat_once(server, num_tokens, repeat)
                last_s, last_tokens = time.monotonic() - begun, num_tokens
    return {"chunk_tokens": CHUNK_TOKENS, "records": [asdict(record) for record in records]}
