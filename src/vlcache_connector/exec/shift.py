"""Reused tokens of a span follow the change that recomputation made to some of them, the samples.

Within a recompute pass, layer by layer: once the fresh KV of a span's samples is there, it is compared with the entry,
and the other tokens are loaded into the pages with a weighted sum of the differences added, before the layer's
attention reads them. A token's weights say how far it is like each sample (`exec.content`); they serve all layers that
have the same samples.
"""

from collections.abc import Sequence

import torch

from vlcache_connector.exec.content import MAX_FITTED, features, weights
from vlcache_connector.exec.stored import Comparison, StoredSpan
from vlcache_connector.exec.upload import Uploads
from vlcache_connector.kernels.ops import load_rows, shift_rows

NBYTES_AT_ONCE = 2 * 2**20
"""On a CPU a layer is moved in parts of so many bytes: what is added is written, read, and written and read again as a
sum before it lies in the pages, and should stay in the caches meanwhile."""


class SpanShift:
    """One span in one pass. Samples must be told by `take` before the first layer, and whenever they become others."""

    def __init__(self, span: StoredSpan, positions: torch.Tensor, block_ids: Sequence[int]) -> None:
        pages, device = span.pages, span.pages.device
        self.span, self._positions = span, positions
        self._slots = pages.slots(block_ids, span.reused, span.offset, span.entry.shape[2])
        self._turns = span.rope.turns(span.delta, device) if span.delta else None
        self._places = span.rope.places(positions[:, span.run.start : span.run.end], device)
        self._uploads = Uploads(span.entry, device)
        self._features = features(span.entry, device)
        self._samples: torch.Tensor | None = None
        # Keys and values of a part of a layer on their way into the pages, and by how much they move: new memory for
        # each layer would take as long as the rest.
        (_, num_tokens, heads, dim), dtype = span.entry.shape[1:], span.entry.dtype
        width = 2 * heads * dim
        limit = NBYTES_AT_ONCE // (width * dtype.itemsize) if device.type == "cpu" else num_tokens
        some = max(1, min(num_tokens, limit))
        self._parts = [slice(first, min(first + some, num_tokens)) for first in range(0, num_tokens, some)]
        self._shifted = torch.empty(2, some, heads, dim, dtype=dtype, device=device)
        self._shift = torch.empty(some, width, dtype=dtype, device=device)

    def take(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """The samples from here on. `rows` [samples] int64: where they are in the pass; `tokens`: their positions. The
        other tokens follow them; without samples they stay as they are stored.
        """
        step = -(-len(rows) // MAX_FITTED) or 1
        self._comparison = Comparison(self.span, self._positions, rows[::step], tokens[::step])
        if self._samples is not None and torch.equal(tokens, self._samples):
            return  # what they stand for is the same
        self._samples = tokens
        own = (tokens - self.span.offset).to(self._slots.device)
        self._weights = weights(self._features, own[::step])
        self._loaded_slots = self._slots.index_fill(0, own, -1)

    def apply(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Load the reused tokens of a layer; `keys` and `values` [rows, heads, dim] are what the pass made."""
        span = self.span
        entry = self._uploads[layer]
        changes = self._comparison.changes(entry, keys, values).to(entry.dtype)
        caches = span.pages.caches[layer : layer + 1]
        for part in self._parts:
            count = part.stop - part.start
            shift = torch.mm(self._weights[part], changes.flatten(1), out=self._shift[:count])
            by_token, out = shift.view(-1, *changes.shape[1:]).transpose(0, 1), self._shifted[:, :count]
            places = self._places[part]
            shift_rows(entry[:, part], by_token, places, turns=self._turns, is_neox=span.rope.is_neox, out=out)
            load_rows(out[None], caches, self._loaded_slots[part], span.pages.layout)
        span.layers_loaded += 1
