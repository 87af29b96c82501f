"""The engine: vLLM with the connector, asked one request at a time. The only module here that imports vLLM."""

import os
import time
from collections.abc import Mapping
from typing import Any

from vlcache_connector.errors import VLCacheError
from vlcache_connector.evaluate.pictures import data_url
from vlcache_connector.evaluate.runs import RefusedError, Reply
from vlcache_connector.evaluate.tasks import Chat

_CONNECTOR = {
    "kv_connector": "VLCacheConnector",
    "kv_connector_module_path": "vlcache_connector",
    "kv_role": "kv_both",
}
_FORGET_TRIES = 100
_STOP_TIMEOUT_S = 30


class EngineError(VLCacheError):
    """vLLM does not start, or does not do what it is told."""


class VLLMAsker:
    """A running engine.

    Args:
        model: path or name, as vLLM takes it.
        engine: keyword arguments of `vllm.LLM`; they come before what is chosen here.
        connector: options of the connector.
        num_images: the most pictures in one chat.
        max_tokens: the most tokens of an answer.
        num_logprobs: how many of the likeliest tokens the first token's distribution is given for.
    """

    def __init__(
        self,
        model: str,
        engine: Mapping[str, Any],
        connector: Mapping[str, Any],
        num_images: int,
        max_tokens: int,
        num_logprobs: int,
    ) -> None:
        # Standard output is for the report. vLLM reads these when it is imported.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams

        chosen: dict[str, Any] = {
            "seed": 0,
            "max_logprobs": num_logprobs,
            "limit_mm_per_prompt": {"image": max(1, num_images), "video": 0},
            "kv_transfer_config": _CONNECTOR | {"kv_connector_extra_config": dict(connector)},
            "disable_log_stats": False,  # or there are no times
        }
        try:
            self._llm = LLM(model, **{**chosen, **engine})
        except Exception as error:
            raise EngineError(f"vLLM does not start: {error}") from error
        vocabulary: int = self._llm.model_config.get_vocab_size()
        self._sampling_class = SamplingParams
        self._max_tokens = max_tokens
        self._num_logprobs = min(num_logprobs, vocabulary)

    @property
    def model_id(self) -> str:
        """What a profile of this model carries."""
        from vlcache_connector.engine import fingerprint  # imports PyTorch

        return fingerprint.model_id(self._llm.llm_engine.vllm_config)

    @property
    def num_layers(self) -> int:
        number: int = self._llm.model_config.get_total_num_hidden_layers()
        return number

    def forget(self, entries: bool) -> None:
        """Empty vLLM's prefix cache and encoder cache and, if so wished, the connector's store."""
        for _ in range(_FORGET_TRIES):
            if self._llm.reset_prefix_cache(reset_connector=entries):
                self._llm.llm_engine.reset_encoder_cache()
                return
            self._step()  # a save still holds blocks
            time.sleep(0.01)
        raise EngineError("vLLM's prefix cache cannot be emptied: blocks stay in use although no request runs")

    def show(self, chat: Chat) -> None:
        """Have the KV of its pictures computed in this context, exactly, and kept."""
        self._ask(chat, self._sampling(1, {"mode": "exact"}))
        self._step()

    def ask(self, chat: Chat, options: Mapping[str, Any]) -> Reply:
        """`options` is `kv_transfer_params["vlcache"]` of the request."""
        sampling = self._sampling(self._max_tokens, options)
        sampling.logprobs, sampling.flat_logprobs = self._num_logprobs, True
        output = self._ask(chat, sampling)
        (completion,) = output.outputs
        flat = completion.logprobs
        first = slice(flat.start_indices[0], flat.end_indices[0])
        tokenizer = self._llm.get_tokenizer()
        return Reply(
            text=tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            first_token=completion.token_ids[0],
            logprobs=dict(zip(flat.token_ids[first], flat.logprobs[first], strict=True)),
            prompt_tokens=len(output.prompt_token_ids),
            report=(output.kv_transfer_params or {}).get("vlcache", {}),
            ttft_s=output.metrics.first_token_latency,
        )

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown(timeout=_STOP_TIMEOUT_S)

    def _step(self) -> None:
        """A request of one token: the engine hears in its steps of saves that are done."""
        self._llm.generate({"prompt_token_ids": [0]}, self._sampling(1, {"mode": "off"}), use_tqdm=False)

    def _ask(self, chat: Chat, sampling: Any) -> Any:
        messages = [
            {**message, "content": [_for_vllm(part) for part in message["content"]]}
            if isinstance(message["content"], list)
            else message
            for message in chat
        ]
        try:
            (output,) = self._llm.chat(messages, sampling, use_tqdm=False)
        except (ValueError, TypeError) as error:
            raise RefusedError(f"vLLM refuses it: {error}") from error
        return output

    def _sampling(self, max_tokens: int, options: Mapping[str, Any]) -> Any:
        """Greedy. Texts are decoded here: vLLM would decode each of the likeliest tokens as well."""
        extra = {"kv_transfer_params": {"vlcache": dict(options)}}
        return self._sampling_class(temperature=0.0, seed=0, max_tokens=max_tokens, detokenize=False, extra_args=extra)


def _for_vllm(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image_url":
        return part
    return {"type": "image_url", "image_url": {"url": data_url(part["image_url"]["url"])}}
