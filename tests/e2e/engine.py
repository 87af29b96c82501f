"""The real engine for tests: vLLM in a process of its own, asked over a pipe.

vLLM keeps global state, so one process holds one engine. Inside, the engine runs in-process (unless a test wants
several processes), so a test can send a function to look at pages, the store and the scheduler, or to plant a fault.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONNECTOR = {"kv_connector": "VLCacheConnector", "kv_connector_module_path": "vlcache_connector", "kv_role": "kv_both"}
START_TIMEOUT_S = 400
CALL_TIMEOUT_S = 300


@dataclass(frozen=True)
class Picture:
    """A reproducible picture. Of the default size it is 100 tokens for Qwen2.5-VL and 64 for Qwen3-VL."""

    seed: int
    width: int = 280
    height: int = 280
    is_closed: bool = True  # whether the end marker follows

    @property
    def text(self) -> str:
        return "<|vision_start|><|image_pad|>" + ("<|vision_end|>" if self.is_closed else "")

    def pixels(self) -> Any:
        import numpy as np
        from PIL import Image

        noise = np.random.default_rng(self.seed).integers(0, 255, (self.height, self.width, 3), dtype=np.uint8)
        return Image.fromarray(noise)


@dataclass(frozen=True)
class Video:
    """A reproducible video; a still one shows one picture all the time. Of the default size it is 80 tokens for
    Qwen2.5-VL: 4 steps of 2 frames, 5 rows and 4 columns each; for Qwen3-VL 4 steps of 16 tokens, each behind the time.
    """

    seed: int
    num_frames: int = 8
    width: int = 112
    height: int = 140
    fps: float = 3.0
    is_still: bool = False
    is_closed: bool = True  # whether the end marker follows

    @property
    def text(self) -> str:
        return "<|vision_start|><|video_pad|>" + ("<|vision_end|>" if self.is_closed else "")

    def frames(self) -> tuple[Any, dict[str, Any]]:
        """Frames [frames, height, width, 3], and what vLLM wants to know about them."""
        import numpy as np

        seeds = [self.seed + (0 if self.is_still else 1000 * number) for number in range(self.num_frames)]
        pictures = [Picture(seed, self.width, self.height) for seed in seeds]
        about = {
            "fps": self.fps,
            "duration": self.num_frames / self.fps,
            "total_num_frames": self.num_frames,
            "frames_indices": list(range(self.num_frames)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        return np.stack([np.asarray(picture.pixels()) for picture in pictures]), about


Part = str | Picture | Video


@dataclass(frozen=True)
class Ask:
    """One request: text, pictures and videos in order."""

    parts: Sequence[Part]
    mode: str = "reuse"
    ratio: float | None = None
    max_tokens: int = 1
    salt: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] | None = None  # in place of mode, ratio and policy
    policy: str | None = None

    def with_mode(self, mode: str, ratio: float | None = None) -> "Ask":
        return Ask(self.parts, mode, ratio, self.max_tokens, self.salt, self.sampling)


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    logprobs: dict[int, float]  # of the first new token
    num_prompt_tokens: int
    num_cached_tokens: int
    report: dict[str, Any]

    def gap(self, other: "Answer") -> float:
        """Largest difference of log-probabilities over the likeliest tokens that both name."""
        common = self.logprobs.keys() & other.logprobs.keys()
        assert len(common) >= len(self.logprobs) // 4, "the two distributions have hardly a likely token in common"
        return max(abs(self.logprobs[t] - other.logprobs[t]) for t in common)


class Engine:
    """A running engine. `options` go to `vllm.LLM`; `connector` are the connector's options, None for plain vLLM."""

    def __init__(
        self,
        checkpoint: Path,
        log: Path,
        connector: dict[str, Any] | None,
        processes: int = 1,
        **options: Any,
    ) -> None:
        self._log = log
        defaults: dict[str, Any] = {
            "max_model_len": 8192,
            "max_num_seqs": 8,
            "block_size": 32,
            "limit_mm_per_prompt": {"image": 6, "video": 0},
            "enforce_eager": True,
        }
        if connector is not None:
            defaults["kv_transfer_config"] = CONNECTOR | {"kv_connector_extra_config": {"host_gib": 0.25} | connector}
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, str(checkpoint), str(log), processes, defaults | options)
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        theirs.close()
        self._receive(START_TIMEOUT_S)

    def ask(self, *asks: Ask) -> list[Answer]:
        """Answers of requests that all start in one engine step, room permitting."""
        answers: list[Answer] = self.call(_ask, asks)
        return answers

    def ask_one(self, ask: Ask) -> Answer:
        return self.ask(ask)[0]

    def forget(self) -> None:
        """Empty vLLM's own prefix cache and encoder cache, not the store."""
        self.call(_forget)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run `function(llm, *arguments)` where the engine is."""
        self._pipe.send((function, arguments))
        return self._receive(CALL_TIMEOUT_S)

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                raise TimeoutError(f"no answer in {timeout_s} s")
            is_fine, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the engine is gone: {error!r}; end of its log:\n{self._log_tail()}") from error
        if not is_fine:
            raise RuntimeError(f"in the engine's process:\n{result}\nend of its log:\n{self._log_tail()}")
        return result

    def log_text(self) -> str:
        return self._log.read_text(errors="replace")

    def _log_tail(self) -> str:
        lines = self.log_text().splitlines()
        return "\n".join([line for line in lines if "set_num_threads" not in line][-30:])


def _serve(pipe: Connection, checkpoint: str, log: str, processes: int, options: dict[str, Any]) -> None:
    """The engine's process: start, then run what arrives until None does."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if processes > 1 else "0"
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    try:
        from vllm import LLM

        llm = LLM(checkpoint, **options)
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    pipe.send((True, None))
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((True, function(llm, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # vLLM's own teardown takes seconds and proves nothing here


def request_of(ask: Ask) -> tuple[dict[str, Any], Any]:
    """vLLM's prompt and sampling parameters."""
    from vllm import SamplingParams

    pictures = [part.pixels() for part in ask.parts if isinstance(part, Picture)]
    videos = [part.frames() for part in ask.parts if isinstance(part, Video)]
    text = "".join(part if isinstance(part, str) else part.text for part in ask.parts)
    prompt: dict[str, Any] = {"prompt": text}
    if pictures or videos:
        media = {"image": pictures, "video": videos}
        prompt["multi_modal_data"] = {modality: items for modality, items in media.items() if items}
    if ask.salt is not None:
        prompt["cache_salt"] = ask.salt
    params = ask.params
    if params is None:
        chosen = {"recompute_ratio": ask.ratio, "policy": ask.policy}
        params = {"mode": ask.mode} | {name: value for name, value in chosen.items() if value is not None}
        # Prices that a small model makes on a busy machine are chance: what pays is tested with prices of its own.
        params |= {"at_any_cost": True} if ask.mode == "reuse" else {}
    sampling = {"max_tokens": ask.max_tokens, "temperature": 0.0, "logprobs": 20, "ignore_eos": True} | ask.sampling
    return prompt, SamplingParams(extra_args={"kv_transfer_params": {"vlcache": params}}, **sampling)


def answer_of(output: Any) -> Answer:
    completion = output.outputs[0]
    logprobs = {token: value.logprob for token, value in completion.logprobs[0].items()}
    report = (output.kv_transfer_params or {}).get("vlcache", {})
    return Answer(list(completion.token_ids), logprobs, len(output.prompt_token_ids), output.num_cached_tokens, report)


def _ask(llm: Any, asks: Sequence[Ask]) -> list[Answer]:
    prompts, sampling = zip(*(request_of(ask) for ask in asks), strict=True)
    return [answer_of(output) for output in llm.generate(list(prompts), list(sampling), use_tqdm=False)]


def _forget(llm: Any) -> None:
    assert llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
