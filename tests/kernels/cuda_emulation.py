"""The CUDA operations without a GPU: the kernels of csrc/cuda/, compiled for the CPU with every thread emulated (see
emulation/simt_emulation.h), as operations of their own on CPU tensors.

CXXFLAGS in the environment are added to the compiler's arguments.
"""

import ctypes
import os
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from vlcache_connector.kernels.ops import PageLayout

ROOT = Path(__file__).parents[2]
OPERATIONS = ("load_rows", "save_rows", "shift_rows", "sparse_query_attention")
SOURCE = Path(__file__).parent / "emulation" / "emulation.cpp"


class Device(ctypes.Structure):
    """What is emulated: how threads take turns (`seed`), the number of multiprocessors, the shared memory of a block.
    What the last call did: whether it moved 16 bytes at a time, its rows per tile, the parts that keys were split into.
    """

    _fields_ = (
        ("seed", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("max_shared_nbytes", ctypes.c_int64),
        ("used_vectors", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("splits", ctypes.c_int32),
    )
    seed: int
    multiprocessors: int
    max_shared_nbytes: int
    used_vectors: int
    rows: int
    splits: int

    def reset(self) -> None:
        self.seed, self.multiprocessors, self.max_shared_nbytes = 0, 4, 227 << 10


@cache
def emulated_device(folder: Path) -> Device:
    """Compiles into `folder` and loads, once per process: afterwards the functions below work."""
    torch_folder = Path(torch.__file__).parent
    library = folder / "cuda_emulation.so"
    command = [
        *shlex.split(os.environ.get("CXX", "g++")),
        *("-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
        *(
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            "-DTORCH_STABLE_ONLY",
            f"-I{ROOT / 'csrc'}",
            f"-I{SOURCE.parent}",
        ),
        *("-isystem", str(torch_folder / "include"), str(SOURCE)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(library)),
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]
    subprocess.run(command, check=True)
    _define()
    torch.ops.load_library(str(library))
    function = ctypes.CDLL(str(library)).vlcache_emulated_device
    function.restype = ctypes.POINTER(Device)
    device: Device = function().contents
    return device


@cache
def _define() -> torch.library.Library:
    """The operations' own schemas in another namespace; they live as long as what this returns."""
    definitions = torch.library.Library("vlcache_emulated", "DEF")
    for name in OPERATIONS:
        schema = str(getattr(torch.ops.vlcache, name).default._schema)
        definitions.define(schema.removeprefix("vlcache::"))
    return definitions


def load_rows(
    entry: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    layout: PageLayout,
    *,
    turns: torch.Tensor | None = None,
    is_neox: bool = True,
    scales: torch.Tensor | None = None,
) -> None:
    """See `ops.load_rows`."""
    pages = (layout.block_size, layout.numbers, layout.order)
    torch.ops.vlcache_emulated.load_rows(entry, list(caches), slots, turns, is_neox, scales, *pages)


def save_rows(
    entry: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    layout: PageLayout,
    *,
    scales: torch.Tensor | None = None,
) -> None:
    """See `ops.save_rows`."""
    pages = (layout.block_size, layout.numbers, layout.order)
    torch.ops.vlcache_emulated.save_rows(entry, list(caches), slots, scales, *pages)


def shift_rows(
    entry: torch.Tensor,
    shift: torch.Tensor,
    places: torch.Tensor,
    *,
    turns: torch.Tensor | None = None,
    is_neox: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.shift_rows`."""
    result = torch.empty(entry.shape, dtype=entry.dtype) if out is None else out
    torch.ops.vlcache_emulated.shift_rows(result, entry, shift, places, turns, is_neox)
    return result


def sparse_query_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    request: torch.Tensor,
    position: torch.Tensor,
    layout: PageLayout,
    *,
    softmax_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.sparse_query_attention`."""
    result = torch.empty(query.shape, dtype=query.dtype) if out is None else out
    pages = (layout.block_size, layout.numbers, layout.order)
    numbers = (softmax_scale, window, soft_cap)
    torch.ops.vlcache_emulated.sparse_query_attention(
        result, query, cache, block_table, request, position, scales, *pages, *numbers
    )
    return result
