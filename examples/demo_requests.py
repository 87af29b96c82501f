"""The demo's chat requests: what is asked, and how one request is sent and measured."""

from __future__ import annotations

import base64
import functools
import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_server import Server, ServerError

from bench import photos

MEGAPIXELS: dict[photos.Name, float] = {"china": 1.5, "flower": 1.0, "hopper": 2.0}
ENGINE_STEP = re.compile(r"Iteration\(\d+\): (\d+) context requests.*?(?:encoder inputs: (\d+)|$)")

ASSISTANT = "You are a helpful assistant."
CURATOR = (
    "You are the curator of a photo archive. Describe what a visitor sees in plain words, name the place and the time "
    "of day when the picture shows them, and say so when it does not. Never guess who a person is."
)
INSPECTOR = "You check pictures for a printer: sharpness, noise, colour casts. Be brief."


@dataclass(frozen=True, slots=True)
class Question:
    """A chat prompt. `parts` are names of photographs and texts, in the order of the prompt."""

    title: str
    system: str
    parts: tuple[str, ...]

    @property
    def photographs(self) -> list[photos.Name]:
        return [name for part in self.parts for name in photos.NAMES if part == name]

    def messages(self) -> list[dict[str, Any]]:
        content = [
            {"type": "image_url", "image_url": {"url": data_url(part)}}
            if part in photos.NAMES
            else {"type": "text", "text": part}
            for part in self.parts
        ]
        return [{"role": "system", "content": self.system}, {"role": "user", "content": content}]


FIRST_SEEN = [
    Question(f"{name} alone, first time", ASSISTANT, (name, "What does this picture show?")) for name in photos.NAMES
]
SEEN_BEFORE = [
    Question("china, other system prompt", CURATOR, ("china", "Write a caption of one sentence.")),
    Question("flower, text in front", ASSISTANT, ("Look at the petals first. ", "flower", "Which colour leads?")),
    Question("hopper, other question", INSPECTOR, ("hopper", "Is the portrait sharp enough for a poster?")),
    Question("flower + china", INSPECTOR, ("flower", "china", "Which of the two has more noise?")),
    Question(
        "china + hopper", CURATOR, ("Here is a building: ", "china", " and a person: ", "hopper", "Compare them.")
    ),
    Question("hopper + flower + china", ASSISTANT, ("hopper", "flower", "china", "Which one was taken indoors?")),
    Question(
        "china, flower, hopper", CURATOR, ("china", "First. ", "flower", "Second. ", "hopper", "Third. Order them.")
    ),
]


@dataclass(frozen=True, slots=True)
class Answer:
    """One measured request. Log-probabilities are those of the 20 likeliest first tokens."""

    ttft_s: float
    num_prompt_tokens: int
    token: str
    logprobs: dict[str, float]
    accounting: dict[str, Any] | None  # kv_transfer_params["vlcache"] of the response
    encoder_runs: int

    @property
    def lead(self) -> float:
        """Log-probability of the likeliest token over that of the second."""
        first, second, *_ = sorted(self.logprobs.values(), reverse=True)
        return first - second


class Client:
    """Sends questions to one server, one at a time; `log` is the server's, which says what each engine step did."""

    def __init__(self, server: Server, log: Path) -> None:
        self._server, self._log = server, log

    def forget(self) -> None:
        """Empty vLLM's own prefix and encoder caches. Entries of the connector and preprocessed pixels stay."""
        if not self._server.post("/reset_prefix_cache")["success"]:
            raise ServerError("vLLM could not reset its prefix cache: a request still holds blocks")
        self._server.post("/reset_encoder_cache")

    def ask(self, question: Question, vlcache: dict[str, Any] | None = None) -> Answer:
        """The time to the response is the time to the first token, because one token is asked for."""
        body: dict[str, Any] = {
            "model": "demo",
            "messages": question.messages(),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
            "return_tokens_as_token_ids": True,
        }
        if vlcache is not None:
            body["kv_transfer_params"] = {"vlcache": vlcache}
        before = self._log.stat().st_size
        start = time.perf_counter()
        response = self._server.post("/v1/chat/completions", body)
        ttft_s = time.perf_counter() - start
        (first,) = response["choices"][0]["logprobs"]["content"]
        return Answer(
            ttft_s,
            response["usage"]["prompt_tokens"],
            first["token"],
            {entry["token"]: entry["logprob"] for entry in first["top_logprobs"]},
            (response.get("kv_transfer_params") or {}).get("vlcache"),
            self._encoder_runs(before),
        )

    def _encoder_runs(self, log_position: int) -> int:
        """Pictures that ran through the vision encoder, from the engine's log lines behind `log_position`."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with self._log.open(errors="replace") as log:
                log.seek(log_position)
                steps = [found.groups() for line in log if (found := ENGINE_STEP.search(line))]
            if any(int(requests) for requests, _ in steps):
                return sum(int(runs or 0) for _, runs in steps)
            time.sleep(0.02)
        raise ServerError("the server's log names no engine step for a request that was answered")


def median_answer(answers: Sequence[Answer]) -> Answer:
    """The one with the median time."""
    return sorted(answers, key=lambda answer: answer.ttft_s)[len(answers) // 2]


@functools.cache
def data_url(name: photos.Name) -> str:
    jpeg = io.BytesIO()
    photos.of_megapixels(name, MEGAPIXELS[name]).save(jpeg, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
