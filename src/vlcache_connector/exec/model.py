"""What the recompute pass needs of a model. One implementation per model family, in `engine/models/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vlcache_connector.exec.rope import Rope
from vlcache_connector.types import Run


@dataclass(frozen=True, slots=True)
class Media:
    """One media item of a prompt, as far as positions and inputs of its tokens depend on it."""

    offset: int
    length: int
    grid: tuple[int, int, int]  # patches in time, height, width, before the encoder merges them
    modality: str = "image"
    seconds: float | None = None  # between two steps of a video's grid; None: what the model takes for granted
    frames: tuple[Run, ...] = ()  # its tokens with encoder output, counted from the first; empty: all of them

    @property
    def embedded(self) -> tuple[Run, ...]:
        """Positions in the prompt of the tokens that take one row each of the encoder's output, in order."""
        frames = self.frames or (Run(0, self.length),)
        return tuple(Run(self.offset + frame.start, self.offset + frame.end) for frame in frames)

    @property
    def num_embedded(self) -> int:
        """Rows of its encoder output."""
        return sum(map(len, self.embedded))

    @property
    def places(self) -> str:
        """What the positions of its tokens among themselves follow from."""
        return f"{self.grid} {self.seconds}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The first tokens of a request and the media items that lie fully within them."""

    token_ids: tuple[int, ...]
    media: tuple[Media, ...]

    def item(self, offset: int) -> Media:
        """The media item that begins at a token."""
        return next(media for media in self.media if media.offset == offset)


class LayerStack(Protocol):
    """A live decoder, layer by layer. All methods run on the model's device, in its dtype."""

    @property
    def num_layers(self) -> int: ...

    @property
    def rope(self) -> Rope:
        """The rotation that the layers apply to keys."""
        ...

    def positions(self, prompt: Prompt) -> torch.Tensor:
        """Rope positions [3, tokens] of a prompt, int64, on the CPU."""
        ...

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Input rows [n, hidden] of tokens [n] as if all were text, a tensor that the caller may write to."""
        ...

    def split_embedding(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Encoder output [n, width] as [n, hidden] pieces: the input rows, then what is added after layer 0, 1, ..."""
        ...

    def run_layer(
        self, layer: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One decoder layer over rows [n, hidden] at `positions` [3, n], inside an attention context."""
        ...

    def run(self, positions: torch.Tensor, hidden: torch.Tensor, added: Sequence[torch.Tensor]) -> None:
        """All layers over rows [n, hidden] at `positions` [3, n], inside an attention context, as the engine runs them:
        compiled where it compiles. `added` [n, hidden]: what is added after layer 0, 1, ...; none where that is zero.
        """
        ...

    def logits(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor | None:
        """Logits [n, vocabulary] of what the last layer gave; None where this rank is not told."""
        ...


def run_layers(
    stack: LayerStack,
    layers: range,
    positions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    added: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some layers, one after the other. `added`: as in `LayerStack.run`."""
    for layer in layers:
        hidden, residual = stack.run_layer(layer, positions, hidden, residual)
        if layer < len(added):
            hidden = hidden + added[layer]
    return hidden, residual
