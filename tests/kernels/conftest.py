"""The same tests for every implementation of the operations: compiled and plain PyTorch, on the CPU and on a GPU where
there is one. Neither vLLM nor transformers is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vlcache_connector.kernels import library, ops, ref
from vlcache_connector.kernels.ops import PageLayout


@dataclass(frozen=True, slots=True)
class Implementation:
    """What tests call. The functions have the arguments of those in `kernels.ops`."""

    device: torch.device
    is_native: bool
    load_rows: Callable[..., None]
    save_rows: Callable[..., None]
    shift_rows: Callable[..., torch.Tensor]
    sparse_query_attention: Callable[..., torch.Tensor]


def load_by_twin(
    entry: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    layout: PageLayout,
    *,
    turns: torch.Tensor | None = None,
    is_neox: bool = True,
    scales: torch.Tensor | None = None,
) -> None:
    ref.load_rows(entry, caches, slots, turns, is_neox, scales, layout.block_size, layout.numbers, layout.order)


def save_by_twin(
    entry: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    layout: PageLayout,
    *,
    scales: torch.Tensor | None = None,
) -> None:
    ref.save_rows(entry, caches, slots, scales, layout.block_size, layout.numbers, layout.order)


def shift_by_twin(
    entry: torch.Tensor,
    shift: torch.Tensor,
    places: torch.Tensor,
    *,
    turns: torch.Tensor | None = None,
    is_neox: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    result = torch.empty_like(entry, memory_format=torch.contiguous_format) if out is None else out
    ref.shift_rows(result, entry, shift, places, turns, is_neox)
    return result


def attend_by_twin(
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
    result = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    pages = (layout.block_size, layout.numbers, layout.order)
    numbers = (softmax_scale, window, soft_cap)
    ref.sparse_query_attention(result, query, cache, block_table, request, position, scales, *pages, *numbers)
    return result


IMPLEMENTATIONS = ["native-cpu", "twin-cpu", *(["native-cuda", "twin-cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: Any) -> Implementation:
    kind, device = request.param.split("-")
    if kind == "twin":
        twins = load_by_twin, save_by_twin, shift_by_twin, attend_by_twin
        return Implementation(torch.device(device), False, *twins)
    states = {state.device: state for state in library.library_report()}
    assert states[device.upper()].is_loaded, states[device.upper()].problem
    native = ops.load_rows, ops.save_rows, ops.shift_rows, ops.sparse_query_attention
    return Implementation(torch.device(device), True, *native)


@pytest.fixture
def device(implementation: Implementation) -> torch.device:
    return implementation.device


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tests are small: a second thread would only wait, for long where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what is to be shared out between threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
