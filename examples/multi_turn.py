"""Conversations about the same photographs, through the OpenAI interface of a running server.

    examples/serve.sh                                  # in another terminal: the small model of this repository
    python examples/multi_turn.py
    python examples/multi_turn.py --url http://gpu-host:8000 --picture cat.jpg --picture dog.jpg

Later turns of one conversation are prefix hits for any vLLM. What only VLCache reuses: the next conversation, under
another system prompt or with the photographs in another order, and a long one whose oldest turns were dropped.

The conversations run as tenants of their own (`cache_salt`), with mode "off" and with reuse. They bring the same
photographs, but nothing of another tenant is used: entries and prefix cache know tenants apart.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from typing import Any

from grid_model.chat import url_of
from offline import GRID_QUESTIONS, QUESTIONS, Message, grid_pictures
from openai import OpenAI
from PIL import Image
from savings import Answer, Savings

SYSTEMS = ("you are a quiet reader of small letters", "our answer will be a short one , not a long story")
NUM_KEPT = 3  # messages of the user that a client keeps in a long conversation


class Chat:
    """One conversation: `messages` grow by what is asked and answered."""

    def __init__(self, client: OpenAI, model: str, tenant: str, mode: str, system: str) -> None:
        self._client, self._model, self._tenant, self._mode = client, model, tenant, mode
        self._system: Message = {"role": "system", "content": system}
        self.messages: list[Message] = []

    def say(self, *parts: str | Image.Image) -> Answer:
        """Ask, and remember the answer."""
        content = [{"type": "text", "text": part} if isinstance(part, str) else url_of(part) for part in parts]
        self.messages.append({"role": "user", "content": content})
        start_s = time.perf_counter()
        response: Any = self._client.chat.completions.create(
            model=self._model,
            messages=[self._system, *self.messages],  # type: ignore[list-item]
            max_tokens=8,
            temperature=0.0,
            extra_body={
                "cache_salt": self._tenant,
                "kv_transfer_params": {"vlcache": {"mode": self._mode, "explain": True}},
            },
        )
        seconds = time.perf_counter() - start_s
        text = (response.choices[0].message.content or "").strip()
        self.messages.append({"role": "assistant", "content": text})
        return Answer(text, seconds, response.kv_transfer_params["vlcache"])

    def drop_oldest(self) -> None:
        """Keep the latest turns only, as clients do when a conversation becomes too long."""
        del self.messages[: -2 * NUM_KEPT]


def converse(
    client: OpenAI, model: str, mode: str, pictures: list[Image.Image], questions: tuple[str, str]
) -> list[tuple[str, Answer]]:
    """Three conversations of one tenant, with a title for each turn."""
    tenant = f"{mode}-{uuid.uuid4()}"
    (a, b), (first, second) = (pictures[0], pictures[-1]), questions
    one, other = (Chat(client, model, tenant, mode, system) for system in SYSTEMS)
    turns = [
        ("first conversation, a new photograph", one.say(a, first)),
        ("  the next question about it", one.say(second)),
        ("  another photograph", one.say(b, first)),
        ("second conversation: other system prompt, the second photograph first", other.say(b, second)),
        ("  and now the first one", other.say(a, first)),
        ("  a question about both", other.say(f"{first} , {second}")),
        ("  more talk", other.say(second)),
    ]
    other.drop_oldest()  # everything behind the system prompt moves
    turns.append(("  after the oldest turn was dropped", other.say(first)))
    return turns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a server with the connector's flag")
    parser.add_argument("--picture", action="append", help="a file; give it twice for two photographs")
    options = parser.parse_args()
    pictures = [Image.open(path).convert("RGB") for path in options.picture or []] or grid_pictures(2)
    questions = QUESTIONS if options.picture else GRID_QUESTIONS
    # The key of the server, where it wants one.
    client = OpenAI(base_url=f"{options.url}/v1", api_key=os.environ.get("VLLM_API_KEY", "none"), max_retries=0)
    model = client.models.list().data[0].id

    converse(client, model, "off", pictures, questions)  # pixels are preprocessed, all code has run once
    plain = converse(client, model, "off", pictures, questions)
    reused = converse(client, model, "reuse", pictures, questions)
    savings = Savings()
    for (title, answer), (_, plain_answer) in zip(reused, plain, strict=True):
        savings.show(title, answer, plain_answer)
    return savings.close()


if __name__ == "__main__":
    sys.exit(main())
