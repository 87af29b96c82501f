"""Requests for the fake engine: prompts of text, images and videos, as vLLM's own request objects, and what is true of
them.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from engine.fake_records import ENGINE_RATIO, IMAGE_TOKEN, Content, Truth
from vlcache_connector.types import Run


@dataclass(frozen=True, slots=True)
class Image:
    name: str
    num_tokens: int

    @property
    def identifier(self) -> str:
        return hashlib.sha256(f"{self.name}:{self.num_tokens}".encode()).hexdigest()

    @property
    def modality(self) -> str:
        return "image"

    @property
    def grid(self) -> tuple[int, int, int]:
        return 1, 2, 2 * self.num_tokens

    @property
    def token_ids(self) -> list[int]:
        return [IMAGE_TOKEN] * self.num_tokens

    def data(self) -> dict[str, MultiModalFieldElem]:
        """As vLLM's processor describes it."""
        grid = torch.tensor(self.grid)
        return {
            "image_grid_thw": MultiModalFieldElem(grid, MultiModalBatchedField(keep_on_cpu=True)),
            "pixel_values": MultiModalFieldElem(grid, MultiModalBatchedField()),
        }


@dataclass(frozen=True, slots=True)
class Video(Image):
    """A token for each step of `seconds`. Its identifier is that of an image of the same name and size, as when a
    client gives both one UUID, and says nothing of the speed.
    """

    seconds: float = 1.0

    @property
    def modality(self) -> str:
        return "video"

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.num_tokens, 2, 2

    def data(self) -> dict[str, MultiModalFieldElem]:
        grid = torch.tensor(self.grid)
        return {
            "video_grid_thw": MultiModalFieldElem(grid, MultiModalBatchedField(keep_on_cpu=True)),
            "second_per_grid_ts": MultiModalFieldElem(
                torch.tensor(self.seconds), MultiModalBatchedField(keep_on_cpu=True)
            ),
            "pixel_values_videos": MultiModalFieldElem(grid, MultiModalBatchedField()),
        }


@dataclass(frozen=True, slots=True)
class Frames(Image):
    """A video of the kind that has text between its frames: before each what time it is, and a token of text behind.
    Its identifier says nothing of the time between two of them.
    """

    num_frames: int = 3
    seconds: int = 1

    @property
    def modality(self) -> str:
        return "video"

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.num_frames, 2, 2 * (self.num_tokens // self.num_frames - 3)

    @property
    def token_ids(self) -> list[int]:
        assert self.num_tokens % self.num_frames == 0
        frame = [IMAGE_TOKEN] * (self.num_tokens // self.num_frames - 3)
        return [token for n in range(self.num_frames) for token in (10 + n * self.seconds, 8, *frame, 9)]

    def data(self) -> dict[str, MultiModalFieldElem]:
        grid = torch.tensor(self.grid)
        return {
            "video_grid_thw": MultiModalFieldElem(grid, MultiModalBatchedField(keep_on_cpu=True)),
            "pixel_values_videos": MultiModalFieldElem(grid, MultiModalBatchedField()),
        }


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: text as token ids, images and videos."""

    parts: Sequence[int | Image]
    mode: str = "reuse"
    ratio: float | None = 0.05  # None: ratio and policy are the engine's
    salt: str | None = None
    max_tokens: int = 2
    policy: str = "leading"
    at_any_cost: bool = False


def text(seed: object, num_tokens: int) -> list[int]:
    """Text of its own for each seed."""
    rng = random.Random(str(seed))
    return [rng.randrange(100, 1000) for _ in range(num_tokens)]


def request_of(ask: Ask, truth: Truth, hasher: Callable[[Any], Any] | None) -> Request:
    sampling = SamplingParams(max_tokens=ask.max_tokens, ignore_eos=True)
    own = {} if ask.ratio is None else {"recompute_ratio": ask.ratio, "policy": ask.policy}
    own |= {"at_any_cost": True} if ask.at_any_cost else {}
    sampling.extra_args = {"kv_transfer_params": {"vlcache": {"mode": ask.mode} | own}}
    return Request(
        truth.request_id,
        list(truth.token_ids[: truth.num_prompt]),
        sampling,
        None,
        mm_features=features_of(ask.parts),
        cache_salt=ask.salt,
        block_hasher=hasher,
    )


def features_of(parts: Sequence[int | Image]) -> list[MultiModalFeatureSpec]:
    features, offset = [], 0
    for part in parts:
        if isinstance(part, Image):
            is_embed = torch.tensor(part.token_ids) == IMAGE_TOKEN
            place = PlaceholderRange(offset, part.num_tokens, None if is_embed.all() else is_embed)
            data = MultiModalKwargsItem(part.data())
            features.append(MultiModalFeatureSpec(data, part.modality, part.identifier, place))
        offset += part.num_tokens if isinstance(part, Image) else 1
    return features


def truth_of(request_id: str, ask: Ask) -> Truth:
    contents, images = list[Content](), dict[Run, str]()
    for part in ask.parts:
        if isinstance(part, Image):
            images[Run(len(contents), len(contents) + part.num_tokens)] = part.identifier
            rows = itertools.count()
            contents += [(part.identifier, next(rows)) if token == IMAGE_TOKEN else token for token in part.token_ids]
        else:
            contents.append(part)
    num_prompt, digests, digest = len(contents), list[int](), 0
    for position in range(num_prompt + ask.max_tokens + 1):
        before = f"{ask.salt} {digest} {contents[position]}".encode()
        digest = int.from_bytes(hashlib.sha256(before).digest()[:8], "little")
        digests.append(digest)
        if position >= num_prompt - 1:  # the answer follows from all that stands before it
            contents.append(1000 + digest % 1000)
    tokens = [content if isinstance(content, int) else IMAGE_TOKEN for content in contents]
    chosen = ask.ratio if ask.ratio is not None else ENGINE_RATIO
    ratio = chosen if ask.mode == "reuse" else None
    return Truth(request_id, tuple(tokens), tuple(contents), tuple(digests), num_prompt, ask.salt, ratio, images)
