"""Spans that a recompute pass has to look at as a whole: what is stored of them, and how fresh KV differs from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.rope import Rope
from vlcache_connector.types import Run


@dataclass(slots=True)
class StoredSpan:
    """A span of a request, and its entry. On the rank that could read it."""

    pages: Pages
    rope: Rope
    offset: int
    entry: torch.Tensor  # keys and values [layers, 2, tokens, heads, dim] of the whole span
    delta: int  # positions by which the span moved
    reused: Sequence[Run]
    is_begun: bool = False  # a pass with samples of it has loaded its reused tokens, or has tried to
    layers_loaded: int = 0
    error: Exception | None = None

    @property
    def run(self) -> Run:
        return Run(self.offset, self.offset + self.entry.shape[2])

    @property
    def nbytes(self) -> int:
        """Of the reused tokens."""
        return self.entry[:, :, 0].numel() * self.entry.element_size() * sum(len(run) for run in self.reused)


class Comparison:
    """Some tokens of a span in a pass, fresh against stored. Keys are compared as they were before rotary positions
    turned them: where a position does not matter.

    Args:
        positions: rope positions [3, tokens] of the request.
        rows: where the tokens are in the pass, int64.
        tokens: their positions in the request, int64.
    """

    def __init__(self, span: StoredSpan, positions: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        device = span.pages.device
        self._rope, self._rows = span.rope, rows.to(device)
        self._tokens = (tokens - span.offset).to(device)
        fresh, stored = (span.rope.places(positions[:, tokens] - delta, device) for delta in (0, span.delta))
        self._places = torch.cat((fresh, stored))

    def changes(self, entry: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """By how much the tokens have changed in a layer: [tokens, 2, heads, dim] in fp32.

        Args:
            entry: the layer of the span's entry [2, tokens, heads, dim], on the device.
            keys, values: what the pass made, [rows, heads, dim].
        """
        stored, count = entry[:, self._tokens], len(self._rows)
        turned_back = self._rope.turned_back(torch.cat((keys[self._rows], stored[0])), self._places)
        return torch.stack((turned_back[:count] - turned_back[count:], values[self._rows].float() - stored[1]), dim=1)
