"""The host tier's bytes: one slab per worker process, and tensor views of the entries in it. Worker side.

A slab is shared memory, so that the scheduler process can move entries between it and the tiers below: `SlabBytes`.

A KV entry of n tokens is      keys and values  [layer][K, V][token][head][dim]  in the dtype of the pages,
followed by                    positions        [channel][token]                 int32,
and                            order            [number]                         int32: tokens that stand for all of
                                                them, most different first; the first `num_ordered(n)` of them.
An embedding entry is          rows             [token][width]                   in the model's dtype.
A layer of a KV entry is one contiguous range, so it can be copied to the device as one piece.
"""

import contextlib
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlcache_connector.store.base import Part
from vlcache_connector.types import Extent, num_ordered

POSITION_CHANNELS = 3  # M-RoPE: time, height, width

_NAMES = {  # of dtypes in safetensors
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
}


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
        return self.order_start(num_tokens) + num_ordered(num_tokens) * torch.int32.itemsize

    def positions_start(self, num_tokens: int) -> int:
        """Where positions begin in a KV entry: aligned for every dtype."""
        return _align(self.kv_payload_nbytes(num_tokens))

    def order_start(self, num_tokens: int) -> int:
        return self.positions_start(num_tokens) + POSITION_CHANNELS * num_tokens * torch.int32.itemsize

    def nbytes(self, kind: str, num_tokens: int) -> int:
        """Of an entry of this kind, "kv" or "embedding"."""
        return self.kv_nbytes(num_tokens) if kind == "kv" else self.embedding_nbytes(num_tokens)

    def embedding_nbytes(self, num_tokens: int) -> int:
        return num_tokens * self.embedding_width * self.embedding_dtype.itemsize


class Slab:
    """One block of shared memory, pinned where there is a CUDA device to copy to. It has a name for as long as it
    lives: `SlabBytes.find` maps it in another process of the same user.
    """

    def __init__(self, nbytes: int, layout: EntryLayout, name: str = "vlcache") -> None:
        self.layout = layout
        self._file = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self._file, nbytes)
        memory = _map(self._file, nbytes)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._is_pinned = torch.cuda.is_available()
        if self._is_pinned:
            _pin(self._bytes)

    def __del__(self) -> None:
        if hasattr(self, "_bytes") and self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        if hasattr(self, "_file"):
            os.close(self._file)

    def kv(self, extent: Extent, num_tokens: int) -> torch.Tensor:
        """Keys and values, a view of shape [layers, 2, num_tokens, kv_heads, head_dim]."""
        layout = self.layout
        raw = self._range(extent, 0, layout.kv_payload_nbytes(num_tokens))
        return raw.view(layout.kv_dtype).view(layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)

    def positions(self, extent: Extent, num_tokens: int) -> torch.Tensor:
        """Rope positions under which the keys were computed, a view of shape [3, num_tokens], int32."""
        start = self.layout.positions_start(num_tokens)
        raw = self._range(extent, start, POSITION_CHANNELS * num_tokens * torch.int32.itemsize)
        return raw.view(torch.int32).view(POSITION_CHANNELS, num_tokens)

    def order(self, extent: Extent, num_tokens: int) -> torch.Tensor:
        """Tokens that stand for all of an entry, a view of shape [num_ordered(num_tokens)], int32."""
        nbytes = num_ordered(num_tokens) * torch.int32.itemsize
        return self._range(extent, self.layout.order_start(num_tokens), nbytes).view(torch.int32)

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


class SlabBytes:
    """A worker's slab as bytes, in the scheduler process."""

    def __init__(self, layout: EntryLayout, file: int) -> None:
        """`file` is the slab's descriptor, which is closed with this object."""
        self._layout = layout
        self.file = file
        self.view = memoryview(_map(file, os.fstat(file).st_size))

    def __del__(self) -> None:
        os.close(self.file)

    @classmethod
    def find(cls, layout: EntryLayout, name: str, pids: Iterable[int | str]) -> "SlabBytes":
        """Map the slab of this name that one of these processes holds. Raises `FileNotFoundError`."""
        for pid in pids:
            for path in _open_files(pid):
                if _target(path) == f"/memfd:{name} (deleted)":
                    return cls(layout, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        raise FileNotFoundError(f"no worker process on this machine holds the memory {name}")

    def parts(self, extent: Extent, kind: str, num_tokens: int) -> list[Part]:
        """See `RankBytes`."""
        layout = self._layout
        if kind == "embedding":
            dtype = layout.embedding_dtype
            return [self._part("embedding", dtype, (num_tokens, layout.embedding_width), extent, 0)]
        shape = (2, num_tokens, layout.num_kv_heads, layout.head_dim)
        payload = layout.kv_payload_nbytes(num_tokens)
        layer_nbytes = payload // max(1, layout.num_layers)
        return [
            *(
                self._part(f"layer.{i}", layout.kv_dtype, shape, extent, i * layer_nbytes)
                for i in range(layout.num_layers)
            ),
            self._part(
                "positions",
                torch.int32,
                (POSITION_CHANNELS, num_tokens),
                extent,
                layout.positions_start(num_tokens),
            ),
            self._order(extent, num_tokens),
        ]

    def order(self, extent: Extent, num_tokens: int) -> Sequence[int]:
        """See `RankBytes`."""
        return self._order(extent, num_tokens).buffer.cast("i")

    def _order(self, extent: Extent, num_tokens: int) -> Part:
        shape = (num_ordered(num_tokens),)
        return self._part("order", torch.int32, shape, extent, self._layout.order_start(num_tokens))

    def _part(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], extent: Extent, start: int) -> Part:
        nbytes = math.prod(shape) * dtype.itemsize
        if start + nbytes > extent.nbytes or extent.offset + start + nbytes > len(self.view):
            raise ValueError(f"{nbytes} bytes at {start} do not fit into {extent} of a {len(self.view)}-byte slab")
        first = extent.offset + start
        return Part(name, _NAMES[dtype], shape, self.view[first : first + nbytes])


def _map(file: int, nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(file, nbytes)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _pin(memory: torch.Tensor) -> None:
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(error) != 0:
        raise RuntimeError(f"{memory.numel()} bytes of host memory cannot be pinned (cudaHostRegister: {error})")


def _open_files(pid: int | str) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # the process ended, or is not ours
        return []


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:  # closed meanwhile
        return ""


def _align(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
