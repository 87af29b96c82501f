"""Reused tokens of a span follow the change that recomputation made to some of them, the samples.

Within a recompute pass, layer by layer: once the fresh KV of a span's samples is there, it is compared with the entry,
and the other tokens are loaded into the pages with a weighted sum of the differences added, before the layer's
attention reads them. A token's weights say how far it is like each sample (`exec.content`); they serve all layers.
Differences of keys are taken before rotary positions turned them, where a position does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlcache_connector.exec.content import MAX_FITTED, features, weights
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
    """One span in one pass. `rows` [samples] int64: where its samples are in the pass; `tokens`: their positions."""

    def __init__(
        self,
        span: ShiftedSpan,
        positions: torch.Tensor,
        block_ids: Sequence[int],
        rows: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        pages, rope, device = span.pages, span.rope, span.pages.device
        step = -(-len(rows) // MAX_FITTED)
        rows, tokens = rows[::step], tokens[::step]
        self._pages, self._rope, self._span = pages, rope, span
        self._slots = pages.slots(block_ids, span.reused, span.offset, span.entry.shape[2])
        self._turns = rope.turns(span.delta, device) if span.delta else None
        self._places = rope.places(positions[:, span.run.start : span.run.end], device)
        self._rows, self._tokens = rows.to(device), (tokens - span.offset).to(device)
        stored_places = rope.places(positions[:, tokens] - span.delta, device)
        self._sample_places = torch.cat((self._places[self._tokens], stored_places))
        self._weights = weights(features(span.entry, device), self._tokens)
        # One layer's keys and values on their way into the pages, and by how much they move: new memory for each would
        # take as long as the rest.
        shape, dtype = span.entry.shape[1:], span.entry.dtype
        self._shifted = torch.empty(shape, dtype=dtype, device=device)
        self._shift = torch.empty(shape[1], shape[0] * shape[2] * shape[3], dtype=dtype, device=device)

    def apply(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Load the reused tokens of a layer; `keys` and `values` [rows, heads, dim] are what the pass made."""
        entry = self._span.entry[layer].to(self._pages.device, non_blocking=True)
        changes = self._changes(entry, keys, values)
        shift = torch.mm(self._weights, changes.flatten(1), out=self._shift)
        by_token = shift.view(-1, *changes.shape[1:]).transpose(0, 1)
        shift_rows(entry, by_token, self._places, turns=self._turns, is_neox=self._rope.is_neox, out=self._shifted)
        load_rows(self._shifted[None], self._pages.caches[layer : layer + 1], self._slots, self._pages.layout)
        self._span.layers_loaded += 1

    def _changes(self, entry: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """By how much the samples have changed: [samples, 2, heads, dim] in the dtype of the entry."""
        stored, count = entry[:, self._tokens], len(self._rows)
        turned_back = self._rope.turned_back(torch.cat((keys[self._rows], stored[0])), self._sample_places)
        change = turned_back[:count] - turned_back[count:], values[self._rows].float() - stored[1].float()
        return torch.stack(change, dim=1).to(entry.dtype)
