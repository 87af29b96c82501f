"""load_rows and save_rows on the CPU beside a copy of the same bytes; `bench_ops.py` runs this.

Blocks of 128 tokens, those of a request in random order, in two layouts. "engine": that of vLLM's CPU backend on this
machine (without AMX: of a head its keys, dimension by dimension, then its values). "unpacked": [block, head, token, K
and V side by side], as on a GPU. "memcpy" is PyTorch's copy of the entry into another tensor, by as many threads as the
operations get. The processor's caches are emptied before each: an entry is loaded long after it was saved, and into
pages that others used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.engine_pages import cache_update, isa_of
from bench.interleaved import Ratio, ratio, times_in_turns
from bench.results import say, table
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.kernels import ref
from vlcache_connector.kernels.ops import PageLayout, Strides, load_rows, save_rows

BLOCK_SIZE = 128
MIB = 2**20
NBYTES_PAST_CACHES = 256 * MIB


@dataclass(frozen=True, slots=True)
class Case:
    mib: int
    layers: int
    heads: int
    dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return self.mib * MIB // (self.layers * 2 * self.heads * self.dim * self.dtype.itemsize)


CASES = [
    Case(16, 12, 2, 64),
    Case(16, 28, 8, 128),
    Case(64, 28, 4, 128),
    Case(64, 24, 8, 64),
    Case(256, 36, 8, 128),
    Case(512, 28, 4, 128),
]
QUICK_CASES = [Case(16, 28, 4, 128)]

SIDES = {"load, keys turned": "load_turned", "load": "load", "save": "save", "one memcpy": "one_memcpy"}


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Tensors of a case."""

    entry: torch.Tensor
    copy: torch.Tensor
    caches: list[torch.Tensor]
    slots: torch.Tensor
    turns: torch.Tensor
    layout: PageLayout

    def functions(self, with_twin: bool) -> dict[str, Callable[[], object]]:
        nbytes = self.entry.nbytes
        place = self.layout.block_size, self.layout.numbers, self.layout.order
        functions: dict[str, Callable[[], object]] = {
            "memcpy": lambda: self.copy.copy_(self.entry),
            "one_memcpy": lambda: ctypes.memmove(self.copy.data_ptr(), self.entry.data_ptr(), nbytes),
            "load_turned": lambda: load_rows(self.entry, self.caches, self.slots, self.layout, turns=self.turns),
            "load": lambda: load_rows(self.entry, self.caches, self.slots, self.layout),
            "save": lambda: save_rows(self.copy, self.caches, self.slots, self.layout),
        }
        if with_twin:
            functions["twin"] = lambda: ref.load_rows(
                self.entry, self.caches, self.slots, self.turns, True, None, *place
            )
        return functions


LAYOUTS = ("engine", "unpacked")


def layout_of(name: str, case: Case, cache: torch.Tensor) -> PageLayout:
    """Raises `ImportError` where the engine's layout is asked for and vLLM's CPU backend is not installed."""
    if name == "unpacked":
        return PageLayout.alike(BLOCK_SIZE, Strides(0, 2 * case.dim, BLOCK_SIZE * 2 * case.dim, 1), case.dim)
    update = cache_update(isa_of(case.dtype, BLOCK_SIZE, case.dim))
    return Pages([PagedLayer("", cache, update)], BLOCK_SIZE, case.heads, case.dim).layout


def work_of(case: Case, layout: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    shape = case.layers, 2, case.tokens, case.heads, case.dim
    blocks = -(-case.tokens // BLOCK_SIZE)
    all_blocks = blocks + blocks // 4 + 2
    caches = [
        torch.zeros(all_blocks, case.heads, BLOCK_SIZE, 2 * case.dim, dtype=case.dtype) for _ in range(case.layers)
    ]
    ids = torch.randperm(all_blocks, generator=generator)[:blocks]
    slots = (ids[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[: case.tokens].contiguous()
    angles = torch.rand(case.dim // 2, generator=generator) * 6
    entry = torch.randn(shape, generator=generator, dtype=torch.float32).to(case.dtype)
    turns = torch.stack((angles.cos(), angles.sin()))
    return Work(entry, torch.zeros_like(entry), caches, slots, turns, layout_of(layout, case, caches[0]))


def measure(case: Case, layout: str, threads: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One result for each number of threads. Raises `RuntimeError` when load and save do not give the entry back."""
    work = work_of(case, layout)
    something_else = torch.ones(NBYTES_PAST_CACHES // 4)

    def read_something_else() -> None:
        something_else.sum()

    functions = work.functions(with_twin=False)
    functions["load"]()
    functions["save"]()
    if not torch.equal(work.copy, work.entry):
        raise RuntimeError(f"{case}: what was loaded and saved again is not what it was")
    results = []
    for count in threads:
        torch.set_num_threads(count)
        times = times_in_turns(functions, repeats, read_something_else)
        ratios = {name: asdict(ratio(times["memcpy"], times[side])) for name, side in SIDES.items()}
        if case.mib <= 64 and layout == "unpacked":
            slow = times_in_turns(work.functions(with_twin=True), 2, read_something_else)
            ratios["twin, keys turned"] = asdict(ratio(slow["memcpy"], slow["twin"]))
        seconds = sorted(times["memcpy"])[len(times["memcpy"]) // 2]
        results.append(
            {
                **{name: str(value) if name == "dtype" else value for name, value in asdict(case).items()},
                "layout": layout,
                "has_order_table": work.layout.order is not None,
                "tokens": case.tokens,
                "threads": count,
                "repeats": repeats,
                "memcpy_gb_per_s": work.entry.nbytes / seconds / 1e9,
                "memcpy_time_over_time": ratios,
            }
        )
    return results


def run(threads: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Measures all cases and prints a table."""
    results = []
    for case in QUICK_CASES if quick else CASES:
        repeats = 5 if quick else max(7, min(41, 1024 // case.mib))
        for layout in LAYOUTS:
            say(f"rows: {case.mib} MiB, {case.layers} layers, {case.heads} heads of {case.dim}, {layout} layout")
            try:
                results += measure(case, layout, threads, repeats)
            except ImportError as error:
                say(f"the {layout} layout is not measured: vLLM's CPU backend is not here ({error})")
    torch.set_num_threads(max(threads))
    show(results)
    return results


def show(results: Sequence[dict[str, Any]]) -> None:
    columns = [*SIDES, "twin, keys turned"]
    rows = []
    for result in results:
        ratios = result["memcpy_time_over_time"]
        shown = [str(Ratio(**ratios[column])) if column in ratios else "" for column in columns]
        size = f"{result['mib']} MiB {result['layers']}x{result['heads']}x{result['dim']}"
        rows.append([size, result["layout"], str(result["threads"]), f"{result['memcpy_gb_per_s']:.1f}", *shown])
    print("\nBandwidth as a share of memcpy's: median (quartiles) of paired runs; more is better")
    print(table(["entry, layers x heads x dim", "layout", "threads", "memcpy GB/s", *columns], rows), flush=True)
