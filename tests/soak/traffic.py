"""The soak's traffic: a seeded, endless mixture of requests over a fixed set of scenes.

A scene is a conversation. Scenes are few enough that each one's plain answer can be known beforehand, and many more
than the store and the prefix cache can hold.
"""

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

TENANTS = (None, "tenant-a", "tenant-b")
SIZES = ((140, 140), (280, 280), (196, 280), (392, 224), (168, 420), (84, 140))
TEXT = "def visit self node return generic for name in values if not None else raise import from class with"
MAX_TOKENS = 8


@dataclass(frozen=True)
class Picture:
    """A few large squares of colour, so that its file is small."""

    seed: int

    def data_url(self) -> str:
        return _data_url(self.seed)


@cache
def _data_url(seed: int) -> str:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(SIZES[seed % len(SIZES)], Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


Part = str | Picture


@dataclass(frozen=True)
class Scene:
    """Turns of the user, with what the assistant is said to have answered between them."""

    turns: tuple[tuple[Part, ...], ...]

    @property
    def num_pictures(self) -> int:
        return sum(isinstance(part, Picture) for turn in self.turns for part in turn)

    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(self.turns):
            if number:
                messages.append({"role": "assistant", "content": f"answer {number}"})
            messages.append({"role": "user", "content": [_content(part) for part in turn]})
        return messages


def _content(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": part.data_url()}}


@dataclass(frozen=True)
class Call:
    """One request."""

    number: int
    scene: int
    kind: str
    params: dict[str, Any] | None
    salt: str | None = None
    max_tokens: int = MAX_TOKENS
    is_streamed: bool = False
    give_up_after_s: float | None = None

    @property
    def name(self) -> str:
        return f"soak-{self.number:06d}"

    def body(self, scenes: Sequence[Scene]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": "tested",
            "messages": scenes[self.scene].messages(),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 20,
            "return_tokens_as_token_ids": True,
            "stream": self.is_streamed,
        }
        if self.params is not None:
            body["kv_transfer_params"] = {"vlcache": self.params}
        if self.salt is not None:
            body["cache_salt"] = self.salt
        return body


KINDS: dict[str, tuple[float, dict[str, Any] | None]] = {
    "default": (0.20, None),
    "reuse 0.05": (0.22, {"mode": "reuse", "recompute_ratio": 0.05}),
    "reuse 0.3": (0.16, {"policy": "leading", "recompute_ratio": 0.3, "explain": True}),
    "reuse 0": (0.04, {"recompute_ratio": 0.0}),
    "reuse 1": (0.14, {"recompute_ratio": 1.0}),
    "exact": (0.08, {"mode": "exact"}),
    "off": (0.11, {"mode": "off"}),
    "invalid": (0.05, {"mode": "of", "recompute_ratoi": 2}),
}
PLAIN_KINDS = {"reuse 1", "exact", "off", "invalid"}
"""Whatever the store holds, these answer as plain vLLM does."""


@dataclass
class Traffic:
    """All of it follows from the seed; what the server makes of it also depends on time."""

    seed: int
    num_scenes: int
    num_pictures: int
    scenes: list[Scene] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._dice = random.Random(f"{self.seed} traffic")
        for _ in range(self.num_scenes):
            self.scenes.append(self._scene())

    def call(self, number: int) -> Call:
        dice = self._dice
        kind = dice.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        return Call(
            number,
            self._zipf(len(self.scenes), 0.7),
            kind,
            KINDS[kind][1],
            dice.choices(TENANTS, (5, 3, 2))[0],
            dice.randint(1, MAX_TOKENS),
            dice.random() < 0.2,
            dice.expovariate(1 / 0.5) if dice.random() < 0.12 else None,
        )

    def plain_call(self, number: int, scene: int, salt: str) -> Call:
        return Call(number, scene, "off", KINDS["off"][1], salt)

    def _scene(self) -> Scene:
        if self.scenes and self._dice.random() < 0.3:
            earlier = self._dice.choice(self.scenes)
            if len(earlier.turns) < 3 and earlier.num_pictures < 4:
                return Scene((*earlier.turns, self._turn(self._dice.choice((0, 0, 1)))))
        return Scene((self._turn(self._dice.choices((0, 1, 2, 3), (1, 4, 4, 2))[0]),))

    def _turn(self, num_pictures: int) -> tuple[Part, ...]:
        parts: list[Part] = [self._text(self._dice.choice((0, 2, 10, 60)))]
        for _ in range(num_pictures):
            parts += [Picture(self._zipf(self.num_pictures, 1.0)), self._text(self._dice.choice((0, 1, 8, 40)))]
        return (*(part for part in parts if part), "what is it?")

    def _text(self, num_words: int) -> str:
        return " ".join(self._dice.choices(TEXT.split(), k=num_words))

    def _zipf(self, count: int, exponent: float) -> int:
        return self._dice.choices(range(count), [1 / (rank + 1) ** exponent for rank in range(count)])[0]
