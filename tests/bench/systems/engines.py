"""Engines of the systems that are compared, each in a process of its own, and what is asked of them there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench import photos
from bench.engine import CONNECTOR, PLACEHOLDER, Engine, Measured
from bench.results import OUT, ROOT, say
from checkpoints import cached_checkpoint
from e2e.engine import Engine as Process

MODEL: dict[str, Any] = {
    "hidden": 1024,
    "layers": 12,
    "vision_hidden": 512,
    "vision_depth": 8,
    "max_pixels": 13_000_000,
}
ENGINE: dict[str, Any] = {
    "block_size": 128,
    "max_num_seqs": 32,
    "limit_mm_per_prompt": {"image": 8, "video": 0},
    # One encoder block in eight attends to the whole picture, the others to windows, as in the released models.
    "hf_overrides": {"vision_config": {"fullatt_block_indexes": [7]}},
    "skip_mm_profiling": True,
    "enable_mm_processor_stats": True,
    "disable_log_stats": False,
}
LOGS = OUT / "bench_systems_logs"


@dataclass(frozen=True, slots=True)
class System:
    """A way to keep what was computed; `options` go to `vllm.LLM`, `environment` is that of its process."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def ours(name: str, **options: Any) -> System:
    extra = {"host_gib": 2} | options
    return System(name, {"kv_transfer_config": CONNECTOR | {"kv_connector_extra_config": extra}})


def kv_connector(name: str, **extra: Any) -> System:
    """One of vLLM's own connectors for KV."""
    config = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return System(name, {"kv_transfer_config": config})


def encoder_connector(name: str, **extra: Any) -> System:
    """One of vLLM's own connectors for encoder outputs."""
    config = {"ec_connector": name, "ec_role": "ec_both", "ec_connector_extra_config": extra}
    # vLLM runs the encoder once at the start, on the largest picture there can be: minutes, unless it is told a size.
    limits = {"image": {"count": 3, "width": 448, "height": 448}, "video": 0}
    return System(name, {"ec_transfer_config": config, "limit_mm_per_prompt": limits})


@contextlib.contextmanager
def started(system: System, max_tokens: int) -> Iterator[Process]:
    """Its engine, for prompts of at most so many tokens, all computed in one step. Raises `RuntimeError` with the
    reason when it does not start.
    """
    checkpoint = cached_checkpoint("qwen2_5_vl", root=ROOT / ".checkpoints", **MODEL)
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{system.name.replace(' ', '_')}.log"
    log.unlink(missing_ok=True)
    limits = {"max_model_len": max_tokens, "max_num_batched_tokens": max_tokens}
    say(f"the engine of {system.name!r} starts")
    with patch.dict(os.environ, system.environment) if system.environment else contextlib.nullcontext():
        process = Process(checkpoint, log, None, **(ENGINE | limits | system.options))
    try:
        yield process
    finally:
        process.close()


def reason_of(error: Exception) -> str:
    """Why an engine did not start: the last exception in its process, and the statement that stumbled, if one did."""
    told = str(error).partition("\nend of its log")[0].strip().splitlines()
    frames = [number for number, line in enumerate(told) if line.startswith("  File ")]
    if not frames:
        return repr(error)
    statement, *behind = told[frames[-1] + 1 :]
    message = next(number for number, line in enumerate(behind) if not line.startswith(" "))
    reason = " ".join(line.strip() for line in behind[message:] if "further information" not in line)
    reason = reason.partition(" [type=")[0]  # of pydantic
    return f"{reason} (in `{statement.strip()}`)" if reason.startswith(("AttributeError", "TypeError")) else reason


@dataclass(frozen=True, slots=True)
class Picture:
    """A photograph of columns x rows tokens; each number gives another one, with its own identifier and content."""

    columns: int
    rows: int
    number: int

    @property
    def num_tokens(self) -> int:
        return self.columns * self.rows

    def pixels(self) -> Any:
        return _drawn(self)


@lru_cache(maxsize=8)
def _drawn(picture: Picture) -> Any:
    name = photos.NAMES[picture.number % len(photos.NAMES)]
    drawn = photos.of_tokens(name, picture.columns, picture.rows)
    drawn.putpixel((0, 0), (picture.number % 256, picture.number // 256, 0))
    return drawn


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text with one placeholder for each picture."""

    text: str
    pictures: tuple[Picture, ...] = ()

    @property
    def num_image_tokens(self) -> int:
        return sum(picture.num_tokens for picture in self.pictures)


def about(opening: str, *pictures: Picture, question: str = "What does it show?") -> Prompt:
    """Pictures between two texts."""
    shown = " and ".join([PLACEHOLDER] * len(pictures))
    return Prompt(f"<|im_start|>user\n{opening}{shown}{question}<|im_end|>\n<|im_start|>assistant\n", pictures)


# -- in the engine's process ------------------------------------------------------------------------------------------


def ask(llm: Any, prompt: Prompt, vlcache: Mapping[str, Any] | None = None) -> Measured:
    return Engine(llm).ask(prompt.text, [one.pixels() for one in prompt.pictures], vlcache)


def num_threads(llm: Any) -> int:
    return Engine(llm).num_threads


def forget(llm: Any) -> None:
    Engine(llm).forget()


def forget_prefixes(llm: Any) -> None:
    Engine(llm).forget_prefixes()


def leave_only_disk(llm: Any, folder: str) -> None:
    """Entries are on disk, in no memory: neither in the host tier nor, as far as the system lets go, in its cache of
    files. The engine waits for the disk as long as it takes.
    """
    from e2e import inside

    inside.be_patient(llm)
    if not inside.drain(llm):
        raise RuntimeError("the disk tier did not finish writing")
    inside.forget_host_tier(llm)
    for path in Path(folder).rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
