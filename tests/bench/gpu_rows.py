"""load_rows, save_rows and shift_rows on a GPU: on its own memory beside a copy of the same bytes there, and between
host and pages as the connector moves entries, beside a copy from and to pinned memory. `gpu.py` runs this. A shift
reads half as much again as a copy: the changes.

Pages as vLLM's GPU backends have them: [block, head, 16 tokens, K and V side by side], blocks of a request in random
order.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu_clock import Clock
from bench.interleaved import Ratio, ratio
from bench.results import say, table
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.exec.rope import Rope
from vlcache_connector.exec.transfer import load_runs, save_run
from vlcache_connector.kernels.ops import load_rows, save_rows, shift_rows
from vlcache_connector.types import Run

BLOCK_SIZE = 16
MIB = 2**20
DELTA = 1234  # positions by which keys are moved


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

    def __str__(self) -> str:
        return f"{self.mib} MiB {self.layers}x{self.heads}x{self.dim}"


# Qwen3-VL-8B, Qwen2.5-VL-7B, and the smallest heads that attention kernels take.
CASES = [Case(mib, 36, 8, 128) for mib in (16, 64, 256, 512)] + [Case(256, 28, 4, 128), Case(256, 24, 2, 64)]
REHEARSED = [Case(2, 3, 2, 64)]
TARGETS = {"load": 0.85, "load, keys turned": 0.85, "save": 0.85, "host to pages": 0.90}


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Tensors of a case, on the device but for `pinned`."""

    case: Case
    entry: torch.Tensor
    copy: torch.Tensor
    pinned: torch.Tensor
    pages: Pages
    block_ids: list[int]
    rope: Rope

    def on_device(self) -> dict[str, Callable[[], object]]:
        run = Run(0, self.case.tokens)
        slots = self.pages.slots(self.block_ids, [run], 0, self.case.tokens)
        turns = self.rope.turns(DELTA, self.entry.device)
        caches, layout = self.pages.caches, self.pages.layout
        places = self.rope.places(torch.arange(self.case.tokens)[None], self.entry.device)
        changes = torch.zeros_like(self.entry[0])

        def shift() -> None:
            for layer, out in zip(self.entry, self.copy, strict=True):
                shift_rows(layer, changes, places, turns=turns, is_neox=True, out=out)

        return {
            "copy": lambda: self.copy.copy_(self.entry),
            "load": lambda: load_rows(self.entry, caches, slots, layout),
            "load, keys turned": lambda: load_rows(self.entry, caches, slots, layout, turns=turns),
            "save": lambda: save_rows(self.copy, caches, slots, layout),
            "shift": shift,
        }

    def across(self) -> dict[str, Callable[[], object]]:
        run = Run(0, self.case.tokens)
        load = partial(load_runs, self.pages, self.rope, self.pinned, 0)
        return {
            "to device": lambda: self.copy.copy_(self.pinned, non_blocking=True),
            "host to pages": lambda: load(DELTA, [run], self.block_ids),
            "to host": lambda: self.pinned.copy_(self.copy, non_blocking=True),
            "pages to host": lambda: save_run(self.pages, self.pinned, run, self.block_ids),
        }


def work_of(case: Case, device: torch.device) -> Work:
    generator = torch.Generator().manual_seed(0)
    blocks = -(-case.tokens // BLOCK_SIZE)
    all_blocks = blocks + blocks // 4 + 2
    shape = all_blocks, case.heads, BLOCK_SIZE, 2 * case.dim
    layers = [
        PagedLayer(str(layer), torch.zeros(shape, dtype=case.dtype, device=device), write_side_by_side)
        for layer in range(case.layers)
    ]
    pages = Pages(layers, BLOCK_SIZE, case.heads, case.dim)
    entry = torch.randn(case.layers, 2, case.tokens, case.heads, case.dim, device=device, dtype=case.dtype)
    pinned = torch.empty(entry.shape, dtype=case.dtype, pin_memory=device.type == "cuda")
    block_ids: list[int] = torch.randperm(all_blocks, generator=generator)[:blocks].tolist()
    rope = Rope(5e6 ** -(torch.arange(case.dim // 2) * 2 / case.dim), is_neox=True)
    return Work(case, entry, torch.zeros_like(entry), pinned.copy_(entry), pages, block_ids, rope)


def write_side_by_side(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """What an attention layer's cache update does: rows [n, heads, dim] into [block, head, token, K and V]."""
    cache.transpose(1, 2)[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = torch.cat((keys, values), dim=-1)


def check(work: Work, clock: Clock) -> None:
    """Raises `RuntimeError` when load and save do not give the entry back, on the device or from the host."""
    functions = work.on_device()
    functions["load"]()
    functions["save"]()
    if not torch.equal(work.copy, work.entry):
        raise RuntimeError(f"{work.case}: what was loaded and saved again is not what it was")
    run = [Run(0, work.case.tokens)]
    load_runs(work.pages, work.rope, work.pinned, 0, 0, run, work.block_ids)
    clock.wait()
    work.pinned.zero_()
    save_run(work.pages, work.pinned, run[0], work.block_ids)
    clock.wait()
    if not torch.equal(work.pinned, work.entry.cpu()):
        raise RuntimeError(f"{work.case}: what came from the host and went back is not what it was")


def measure(case: Case, clock: Clock, device: torch.device, repeats: int) -> dict[str, Any]:
    work = work_of(case, device)
    check(work, clock)
    on_device = clock.on_device_in_turns(work.on_device(), repeats)
    ratios = {name: ratio(on_device["copy"], times) for name, times in on_device.items() if name != "copy"}
    across = clock.by_wall_in_turns(work.across(), max(3, repeats // 3))
    ratios["host to pages"] = ratio(across["to device"], across["host to pages"])
    ratios["pages to host"] = ratio(across["to host"], across["pages to host"])
    seconds = {name: statistics.median(times) for name, times in (on_device | across).items()}
    return {
        **{name: str(value) if name == "dtype" else value for name, value in asdict(case).items()},
        "tokens": case.tokens,
        "repeats": repeats,
        "gb_per_s_copied": 2e-9 * work.entry.nbytes / seconds["copy"],  # bytes read and bytes written
        "gb_per_s_to_device": 1e-9 * work.entry.nbytes / seconds["to device"],
        "median_s": seconds,
        "copy_time_over_time": {name: asdict(value) for name, value in ratios.items()},
    }


def run(device: torch.device, *, rehearse: bool) -> list[dict[str, Any]]:
    """Measures all cases and prints a table."""
    clock, results = Clock(device), []
    for case in REHEARSED if rehearse else CASES:
        results.append(measure(case, clock, device, 3 if rehearse else 30))
        say(f"rows: {case} measured")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show(results)
    return results


def show(results: Sequence[dict[str, Any]]) -> None:
    columns = list(results[0]["copy_time_over_time"])
    rows = []
    for result in results:
        ratios = [str(Ratio(**result["copy_time_over_time"][column])) for column in columns]
        size = f"{result['mib']} MiB {result['layers']}x{result['heads']}x{result['dim']}"
        rows.append([size, f"{result['gb_per_s_copied']:.0f}", f"{result['gb_per_s_to_device']:.1f}", *ratios])
    print("\nBandwidth as a share of a plain copy's: median (quartiles) of runs in turns; more is better.")
    print("The first copy is one on the device (bytes read and written); those to and from pages start at the host.")
    print(table(["entry, layers x heads x dim", "copy GB/s", "H2D GB/s", *columns], rows))
    for column, target in TARGETS.items():
        medians = [result["copy_time_over_time"][column]["median"] for result in results]
        met = sum(median >= target for median in medians)
        print(f"{column}: at least {target:.0%} wanted, {met} of {len(medians)} cases reach it")
    print(flush=True)
