"""The clients of the soak: they ask, read streams, or hang up."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import aiohttp

from soak.traffic import Call, Scene

ANSWER_TIMEOUT_S = 300


@dataclass
class Answer:
    """What came back. `tops` are the likeliest tokens of each position, by their text ("token_id:5")."""

    call: Call
    tokens: list[str] = field(default_factory=list)
    tops: list[dict[str, float]] = field(default_factory=list)
    report: dict[str, Any] | None = None  # None: streamed, or there was nothing to report
    error: str | None = None
    has_given_up: bool = False

    def take(self, choice: dict[str, Any]) -> None:
        for position in (choice.get("logprobs") or {}).get("content") or []:
            self.tokens.append(position["token"])
            self.tops.append({top["token"]: top["logprob"] for top in position["top_logprobs"]})


class Client:
    """Requests to one server."""

    def __init__(self, session: aiohttp.ClientSession, scenes: Sequence[Scene]) -> None:
        self._session = session
        self._scenes = scenes

    async def ask(self, call: Call) -> Answer:
        """The answer; an error of the server is part of it, never raised."""
        answer = Answer(call)
        try:
            await asyncio.wait_for(self._ask(call, answer), call.give_up_after_s or ANSWER_TIMEOUT_S)
        except TimeoutError:
            answer.has_given_up = call.give_up_after_s is not None
            answer.error = None if answer.has_given_up else f"no answer in {ANSWER_TIMEOUT_S} s"
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            answer.error = repr(error)
        return answer

    async def ask_all(self, calls: Iterable[Call], concurrency: int) -> list[Answer]:
        """Answers in the order of `calls`."""
        gate = asyncio.Semaphore(concurrency)

        async def gated(call: Call) -> Answer:
            async with gate:
                return await self.ask(call)

        return list(await asyncio.gather(*map(gated, calls)))

    async def _ask(self, call: Call, answer: Answer) -> None:
        headers = {"X-Request-Id": call.name}
        body = call.body(self._scenes)
        async with self._session.post("/v1/chat/completions", json=body, headers=headers) as response:
            if response.status != 200:
                answer.error = f"status {response.status}: {(await response.text())[:300]}"
            elif call.is_streamed:
                await _read_stream(response, answer)
            else:
                content = await response.json()
                answer.take(content["choices"][0])
                answer.report = (content.get("kv_transfer_params") or {}).get("vlcache")


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer) -> None:
    async for raw in response.content:
        line = raw.decode().strip()
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            answer.error = f"in the stream: {str(chunk['error'])[:300]}"
        for choice in chunk.get("choices", []):
            answer.take(choice)


@asynccontextmanager
async def connected(url: str, scenes: Sequence[Scene]) -> AsyncIterator[Client]:
    # A line of a stream can hold 20 candidates of several tokens.
    async with aiohttp.ClientSession(url, read_bufsize=1 << 20) as session:
        yield Client(session, scenes)


async def run_waves(
    client: Client, calls: Iterable[Call], seed: int, after_wave: Callable[[list[Answer]], None]
) -> None:
    """All calls in waves of changing concurrency, 1 to 16; some waves are followed by a pause, in which the engine is
    idle.
    """
    dice, calls = random.Random(f"{seed} waves"), iter(calls)
    while wave := list(islice(calls, dice.randint(15, 60))):
        after_wave(await client.ask_all(wave, dice.randint(1, 16)))
        if dice.random() < 0.3:
            await asyncio.sleep(dice.uniform(0.2, 1.0))
