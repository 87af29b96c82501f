"""Moves the reused tokens of a span by the mean change that recomputation made to some of them.

Within a recompute pass, layer by layer: once the fresh KV of a span's samples is there, they are compared with the
entry, and the other tokens are loaded into the pages with the mean difference added, before the layer's attention
reads them. Differences of keys are taken before rotary positions turned them, where one vector serves all tokens.

How far the mean is trusted: each run of samples has a mean of its own. With n runs and s^2 the variance of their means
(summed over a head's dimensions), the squared length of the mean m is s^2 / n too large on average; so the factor is
max(0, 1 - s^2 / (n |m|^2)), the James-Stein one. A head whose samples do not agree stays where it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.rope import Rope
from vlcache_connector.kernels.ops import load_rows, shift_rows
from vlcache_connector.types import Run


@dataclass(slots=True)
class ShiftedSpan:
    """A span of a request whose reused tokens are loaded during the pass that recomputes its samples."""

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


class SpanShift:
    """One span in one pass. `samples`: (first row in the pass, tokens) of each run of the span's tokens in it."""

    def __init__(
        self,
        span: ShiftedSpan,
        positions: torch.Tensor,
        block_ids: Sequence[int],
        samples: Sequence[tuple[int, Run]],
    ) -> None:
        pages, rope, device = span.pages, span.rope, span.pages.device
        self._pages, self._rope, self._span = pages, rope, span
        self._slots = pages.slots(block_ids, span.reused, span.offset, span.entry.shape[2])
        self._turns = rope.turns(span.delta, device) if span.delta else None
        self._places = rope.places(positions[:, span.run.start : span.run.end], device)
        self._rows = torch.cat([torch.arange(first, first + len(run)) for first, run in samples]).to(device)
        tokens = torch.cat([torch.arange(run.start, run.end) for _, run in samples])
        self._tokens = (tokens - span.offset).to(device)
        stored_places = rope.places(positions[:, tokens] - span.delta, device)
        self._sample_places = torch.cat((self._places[self._tokens], stored_places))
        averaging = torch.block_diag(*(torch.full((1, len(run)), 1 / len(run)) for _, run in samples))
        self._averaging = torch.cat((averaging, -averaging), dim=1).to(device)  # [runs, fresh and stored samples]
        # One layer's keys and values on their way into the pages: new memory for each would take as long as the rest.
        self._shifted = torch.empty(span.entry.shape[1:], dtype=span.entry.dtype, device=device)

    def apply(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Load the reused tokens of a layer; `keys` and `values` [rows, heads, dim] are what the pass made."""
        entry = self._span.entry[layer].to(self._pages.device, non_blocking=True)
        shift = _trusted(self._changes(entry, keys, values))
        shift_rows(entry, shift, self._places, turns=self._turns, is_neox=self._rope.is_neox, out=self._shifted)
        load_rows(self._shifted[None], self._pages.caches[layer : layer + 1], self._slots, self._pages.layout)
        self._span.layers_loaded += 1

    def _changes(self, entry: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """By how much the samples of each run have changed, on average: [2, runs, heads, dim]."""
        stored = entry[:, self._tokens]
        all_keys = self._rope.turned_back(torch.cat((keys[self._rows], stored[0])), self._sample_places)
        all_values = torch.cat((values[self._rows], stored[1])).float()
        means = [self._averaging @ rows.flatten(1) for rows in (all_keys, all_values)]
        return torch.stack(means).view(2, -1, *entry.shape[2:])


def _trusted(changes: torch.Tensor) -> torch.Tensor:
    """The mean [2, heads, dim] of changes [2, runs, heads, dim], as far as the runs agree about it."""
    runs, mean = changes.shape[1], changes.mean(1)
    if runs == 1:
        return mean
    spread = (changes - mean[:, None]).square().sum((1, 3))[..., None]  # [2, heads, 1]
    noise = spread / (runs * (runs - 1))
    size = mean.square().sum(-1, keepdim=True)
    return mean * (1 - noise / size.clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(0)
