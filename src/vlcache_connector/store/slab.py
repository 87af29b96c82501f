"""The host tier's bytes: one slab per worker process, and tensor views of the entries in it. Worker side.

A KV entry of n tokens is      keys and values  [layer][K, V][token][head][dim]  in the dtype of the pages,
followed by                    positions        [channel][token]                 int32.
An embedding entry is          rows             [token][width]                   in the model's dtype.
A layer of a KV entry is one contiguous range, so it can be copied to the device as one piece.
"""

from dataclasses import dataclass

import torch

from vlcache_connector.types import Extent

POSITION_CHANNELS = 3  # M-RoPE: time, height, width


@dataclass(frozen=True, slots=True)
class EntryLayout:
    """Shapes that all entries of one model and rank share. Pure numbers: both sides derive it from the engine's
    config.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype
    embedding_width: int
    embedding_dtype: torch.dtype

    def kv_payload_nbytes(self, num_tokens: int) -> int:
        """Bytes of keys and values alone."""
        return self.num_layers * 2 * num_tokens * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize

    def kv_nbytes(self, num_tokens: int) -> int:
        positions_nbytes = POSITION_CHANNELS * num_tokens * torch.int32.itemsize
        # The payload is padded so that the positions behind it are aligned for every dtype.
        return _align(self.kv_payload_nbytes(num_tokens)) + positions_nbytes

    def embedding_nbytes(self, num_tokens: int) -> int:
        return num_tokens * self.embedding_width * self.embedding_dtype.itemsize


class Slab:
    """One block of host memory, pinned where there is a CUDA device to copy to."""

    def __init__(self, nbytes: int, layout: EntryLayout) -> None:
        self.layout = layout
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def kv(self, extent: Extent, num_tokens: int) -> torch.Tensor:
        """Keys and values, a view of shape [layers, 2, num_tokens, kv_heads, head_dim]."""
        layout = self.layout
        raw = self._range(extent, 0, layout.kv_payload_nbytes(num_tokens))
        return raw.view(layout.kv_dtype).view(layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)

    def positions(self, extent: Extent, num_tokens: int) -> torch.Tensor:
        """Rope positions under which the keys were computed, a view of shape [3, num_tokens], int32."""
        start = _align(self.layout.kv_payload_nbytes(num_tokens))
        raw = self._range(extent, start, POSITION_CHANNELS * num_tokens * torch.int32.itemsize)
        return raw.view(torch.int32).view(POSITION_CHANNELS, num_tokens)

    def embedding(self, extent: Extent, num_tokens: int) -> torch.Tensor:
        """Encoder output, a view of shape [num_tokens, width]."""
        raw = self._range(extent, 0, self.layout.embedding_nbytes(num_tokens))
        return raw.view(self.layout.embedding_dtype).view(num_tokens, self.layout.embedding_width)

    def _range(self, extent: Extent, start: int, nbytes: int) -> torch.Tensor:
        """Bytes [start, start + nbytes) of an extent. Raises `ValueError` rather than touch a neighbour's bytes."""
        first, last = extent.offset + start, extent.offset + start + nbytes
        if start + nbytes > extent.nbytes or last > len(self._bytes):
            raise ValueError(f"{nbytes} bytes at {start} do not fit into {extent} of a {len(self._bytes)}-byte slab")
        return self._bytes[first:last]


def _align(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
