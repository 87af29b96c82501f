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
        self._tokens = torch.cat([torch.arange(run.start, run.end) for _, run in samples]) - span.offset
        numbers = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(run) for _, run in samples]))
        self._averaging = torch.nn.functional.one_hot(numbers).float()
        self._averaging = (self._averaging / self._averaging.sum(0)).T.to(device)  # [runs, samples]
        self._fresh_places = self._places[self._tokens.to(device)]
        stored = rope.places(positions[:, span.offset + self._tokens] - span.delta, device)
        self._stored_places = stored

    def apply(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Load the reused tokens of a layer; `keys` and `values` [rows, heads, dim] are what the pass made."""
        entry = self._span.entry[layer].to(self._pages.device, non_blocking=True)
        stored = self._span.entry[layer][:, self._tokens].to(self._pages.device)
        key_change = self._rope.turned_back(keys[self._rows], self._fresh_places)
        key_change -= self._rope.turned_back(stored[0], self._stored_places)
        change = torch.stack((key_change, values[self._rows].float() - stored[1].float()))
        shifted = shift_rows(entry, self._mean(change), self._places, turns=self._turns, is_neox=self._rope.is_neox)
        load_rows(shifted[None], self._pages.caches[layer : layer + 1], self._slots, self._pages.layout)

    def _mean(self, change: torch.Tensor) -> torch.Tensor:
        """[2, heads, dim] of changes [2, samples, heads, dim]."""
        means = torch.einsum("rs,kshd->krhd", self._averaging, change)
        runs, mean = means.shape[1], means.mean(1)
        if runs == 1:
            return mean
        noise = means.var(1).sum(-1, keepdim=True) / runs
        size = mean.square().sum(-1, keepdim=True)
        return mean * (1 - noise / size.clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(0)
