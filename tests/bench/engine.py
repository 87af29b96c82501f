"""One engine in the process of a benchmark, asked one request after the other.

Times are the engine's own: from the moment its scheduler has the request until the first token is there. Wall-clock
times add tokenising, preprocessing and hashing the images. OMP_NUM_THREADS=1 gives even times also while other work is
going on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from bench.results import ROOT, say
from checkpoints import cached_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the CPU build warns twice per request
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
CONNECTOR = {
    "kv_connector": "VLCacheConnector",
    "kv_connector_module_path": "vlcache_connector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"host_gib": 2},
}


class VariantError(Exception):
    """A variant did not do what its name says, so there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Measured:
    engine_s: float  # from the scheduler's queue to the first token
    wall_s: float  # `LLM.generate`
    num_prompt_tokens: int
    num_cached_tokens: int  # as vLLM counts: from its prefix cache and from a connector
    accounting: dict[str, Any]
    encoder_runs: int
    encoder_s: float


@dataclass(frozen=True, slots=True)
class Engine:
    llm: Any

    @classmethod
    def start(cls, model: Mapping[str, Any], compiled: bool = False, **options: Any) -> Engine:
        """A Qwen2.5-VL with random weights of the sizes `model`; `options` go to `vllm.LLM`."""
        say("building or finding the checkpoint")
        checkpoint = cached_checkpoint("qwen2_5_vl", root=ROOT / ".checkpoints", **model)
        say("the engine starts " + ("and compiles" if compiled else "(eager)"))
        from vllm import LLM

        defaults: dict[str, Any] = {
            "skip_mm_profiling": True,
            "enable_mm_processor_stats": True,  # counts and times the encoder's runs
            "disable_log_stats": False,  # otherwise answers carry no engine times
            "kv_transfer_config": CONNECTOR,
        }
        engine = cls(LLM(str(checkpoint), enforce_eager=not compiled, **(defaults | options)))
        say(f"ready, {engine.num_threads} threads")
        return engine

    @property
    def num_threads(self) -> int:
        import torch

        return torch.get_num_threads()

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        number: int = self.llm.llm_engine.vllm_config.model_config.hf_text_config.num_hidden_layers
        return number

    @property
    def block_size(self) -> int:
        """Tokens of a block, as vLLM's prefix cache keeps them: whole ones only."""
        size: int = self.llm.llm_engine.vllm_config.cache_config.block_size
        return size

    def lengthened(self, text: str, words: str, num_tokens: int) -> list[int]:
        """A prompt of token ids: those of `text`, then exactly `num_tokens` of `words`, over and over."""
        tokenizer = self.llm.get_tokenizer()
        return [*tokenizer.encode(text), *islice(cycle(tokenizer.encode(words)), num_tokens)]

    def forget(self) -> None:
        """Empty vLLM's own prefix and encoder caches; not the entries, not the preprocessed images."""
        self.forget_prefixes()
        self.forget_encoder_outputs()

    def forget_prefixes(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise VariantError("vLLM could not reset its prefix cache: a request still holds blocks")

    def forget_encoder_outputs(self) -> None:
        self.llm.llm_engine.reset_encoder_cache()

    def ask(
        self,
        prompt: str | list[int],
        images: Sequence[Any],
        vlcache: Mapping[str, Any] | None,
        salt: str | None = None,
    ) -> Measured:
        """`prompt` is text or token ids, with one placeholder per image. `vlcache` is what the request asks of the
        connector, None in an engine without it.
        """
        from vllm import SamplingParams

        extra = {"kv_transfer_params": {"vlcache": dict(vlcache)}} if vlcache is not None else None
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, extra_args=extra)
        content = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        request: dict[str, Any] = content | {"multi_modal_data": {"image": list(images)}}
        if salt is not None:
            request["cache_salt"] = salt
        start = time.perf_counter()
        (output,) = self.llm.generate(request, sampling, use_tqdm=False)
        wall_s = time.perf_counter() - start
        encoder = self.llm.collective_rpc("get_encoder_timing_stats")[0].values()
        return Measured(
            output.metrics.first_token_ts - output.metrics.queued_ts,
            wall_s,
            len(output.prompt_token_ids),
            output.num_cached_tokens,
            output.kv_transfer_params["vlcache"] if vlcache is not None else {},
            sum(run["num_encoder_calls"] for run in encoder),
            sum(run["encoder_forward_secs"] for run in encoder),
        )
