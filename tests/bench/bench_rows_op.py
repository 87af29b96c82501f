"""load_rows and save_rows on the CPU beside a copy of the same bytes; `bench_ops.py` runs this.

Pages as the engine has them on a CPU: [block, head, 128 tokens, K and V side by side], blocks of a request in random
order. "memcpy" is PyTorch's copy of the entry into another tensor, by as many threads as the operations get. The
processor's caches are emptied before each: an entry is loaded long after it was saved, and into pages that others used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.interleaved import Ratio, ratio, times_in_turns
from bench.results import say, table
from vlcache_connector.kernels import ref
from vlcache_connector.kernels.ops import PageLayout, load_rows, save_rows

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
        place = (self.layout.block_size, self.layout.strides, self.layout.order)
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


def work_of(case: Case) -> Work:
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
    layout = PageLayout(BLOCK_SIZE, (0, case.dim, 2 * case.dim, BLOCK_SIZE * 2 * case.dim, 1))
    return Work(entry, torch.zeros_like(entry), caches, slots, torch.stack((angles.cos(), angles.sin())), layout)


def measure(case: Case, threads: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One result for each number of threads. Raises `RuntimeError` when load and save do not give the entry back."""
    work = work_of(case)
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
        if case.mib <= 64:
            slow = times_in_turns(work.functions(with_twin=True), 2, read_something_else)
            ratios["twin, keys turned"] = asdict(ratio(slow["memcpy"], slow["twin"]))
        seconds = sorted(times["memcpy"])[len(times["memcpy"]) // 2]
        results.append(
            {
                **{name: str(value) if name == "dtype" else value for name, value in asdict(case).items()},
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
        say(f"rows: {case.mib} MiB, {case.layers} layers, {case.heads} heads of {case.dim}")
        results += measure(case, threads, repeats)
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
        rows.append([size, str(result["threads"]), f"{result['memcpy_gb_per_s']:.1f}", *shown])
    print("\nBandwidth as a share of memcpy's: median (quartiles) of paired runs; more is better")
    print(table(["entry, layers x heads x dim", "threads", "memcpy GB/s", *columns], rows), flush=True)
