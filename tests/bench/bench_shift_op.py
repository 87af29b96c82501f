"""Reused tokens that each move by a change of their own, one layer at a time as a recompute pass loads them;
`bench_ops.py` runs this.

"load, turned" is load_rows with rotation alone, as other spans are loaded; "shift + load" is shift_rows into memory
that stays and load_rows from there, with one change per token, as a matrix product leaves them; "in a pass" is all that
exec/shift.py does for a layer, with 2 % of the tokens as samples. "memcpy" is PyTorch's copy of the same bytes. Pages
and emptied caches as in bench_rows_op.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.bench_rows_op import BLOCK_SIZE, NBYTES_PAST_CACHES
from bench.engine_pages import cache_update, isa_of
from bench.interleaved import Ratio, ratio, times_in_turns
from bench.results import say, table
from vlcache_connector.exec.pages import CacheUpdate, PagedLayer, Pages
from vlcache_connector.exec.rope import Rope
from vlcache_connector.exec.shift import SpanShift
from vlcache_connector.exec.stored import StoredSpan
from vlcache_connector.kernels.ops import load_rows, shift_rows
from vlcache_connector.policy.shifted import Shifted
from vlcache_connector.types import Run

DTYPE = torch.bfloat16
LAYERS = 8
DELTA, OFFSET = 37, 100  # positions by which the span moved; tokens in front of it
RATIO = 0.02
LAYOUTS = ("engine", "unpacked")


@dataclass(frozen=True, slots=True)
class Case:
    tokens: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.heads}x{self.dim}"


CASES = [Case(tokens, heads, dim) for tokens in (1600, 8192) for heads, dim in ((2, 64), (8, 128))]
QUICK_CASES = CASES[:1]


def write_side_by_side(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """A cache update for pages [block, head, token, K and V]."""
    cache.transpose(1, 2)[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = torch.cat((keys, values), dim=-1)


def pages_of(case: Case, layout: str) -> Pages:
    """Raises `ImportError` where the engine's layout is asked for and vLLM's CPU backend is not installed."""
    update: CacheUpdate = write_side_by_side
    if layout == "engine":
        update = cache_update(isa_of(DTYPE, BLOCK_SIZE, case.dim))
    shape = (OFFSET + case.tokens) // BLOCK_SIZE + 3, case.heads, BLOCK_SIZE, 2 * case.dim
    layers = [PagedLayer(str(layer), torch.zeros(shape, dtype=DTYPE), update) for layer in range(LAYERS)]
    return Pages(layers, BLOCK_SIZE, case.heads, case.dim)


def positions_of(case: Case) -> torch.Tensor:
    """[3, tokens]: text, then an image whose rows and columns have positions of their own."""
    side = int(case.tokens**0.5)
    token = torch.arange(case.tokens)
    image = OFFSET + torch.stack((torch.zeros_like(token), token // side, token % side))
    return torch.cat((torch.arange(OFFSET).expand(3, -1), image), dim=1)


def functions_of(case: Case, layout: str) -> dict[str, Callable[[], object]]:
    """Each moves all layers, one after the other."""
    generator = torch.Generator().manual_seed(0)
    pages, positions = pages_of(case, layout), positions_of(case)
    block_ids: list[int] = torch.randperm(len(pages.caches[0]), generator=generator).tolist()
    rope = Rope(5e6 ** -(torch.arange(case.dim // 2) * 2 / case.dim), True, torch.arange(case.dim // 2) % 3)
    entry = torch.randn(LAYERS, 2, case.tokens, case.heads, case.dim, generator=generator).to(DTYPE)
    sampled = [Run(OFFSET + run.start, OFFSET + run.end) for run in Shifted().recompute(case.tokens, RATIO)]
    ends = [*(run.start for run in sampled[1:]), OFFSET + case.tokens]
    reused = [Run(run.end, end) for run, end in zip(sampled, ends, strict=True)]
    samples = torch.tensor([token for run in sampled for token in range(run.start, run.end)])
    fresh = torch.randn(2, len(samples), case.heads, case.dim, generator=generator).to(DTYPE)
    span = StoredSpan(pages, rope, OFFSET, entry, DELTA, reused)
    rows = torch.arange(len(samples))

    def begin() -> SpanShift:
        shift = SpanShift(span, positions, block_ids)
        shift.take(rows, samples)
        return shift

    in_a_pass = begin()
    slots, turns = pages.slots(block_ids, reused, OFFSET, case.tokens), rope.turns(DELTA, pages.device)
    places = rope.places(positions[:, OFFSET:], pages.device)
    products = torch.randn(case.tokens, 2, case.heads, case.dim, generator=generator).to(DTYPE)
    changes = products.transpose(0, 1)
    copy, shifted = torch.zeros_like(entry), torch.zeros_like(entry[0])

    def load(layer: int, rows: torch.Tensor, turns: torch.Tensor | None = None) -> None:
        load_rows(rows[None], pages.caches[layer : layer + 1], slots, pages.layout, turns=turns)

    def shift(layer: int) -> torch.Tensor:
        return shift_rows(entry[layer], changes, places, turns=turns, out=shifted)

    def of_all_layers(move: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [move(layer) for layer in range(LAYERS)]

    return {
        "memcpy": of_all_layers(lambda layer: copy[layer].copy_(entry[layer])),
        "load, turned": of_all_layers(lambda layer: load(layer, entry[layer], turns)),
        "shift": of_all_layers(shift),
        "shift + load": of_all_layers(lambda layer: load(layer, shift(layer))),
        "in a pass": of_all_layers(lambda layer: in_a_pass.apply(layer, fresh[0], fresh[1])),
        "begin": begin,
    }


def measure(case: Case, layout: str, threads: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One result for each number of threads."""
    functions = functions_of(case, layout)
    something_else = torch.ones(NBYTES_PAST_CACHES // 4)
    results = []
    for count in threads:
        torch.set_num_threads(count)
        times = times_in_turns(functions, repeats, lambda: something_else.sum())
        results.append(
            {
                **asdict(case),
                "layout": layout,
                "threads": count,
                "repeats": repeats,
                "ms_per_layer": {name: 1e3 * sorted(some)[len(some) // 2] / LAYERS for name, some in times.items()},
                "time_over_time_of_load": {
                    name: asdict(ratio(some, times["load, turned"])) for name, some in times.items()
                },
            }
        )
    return results


def run(threads: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Measures all cases and prints a table."""
    results = []
    for case in QUICK_CASES if quick else CASES:
        for layout in LAYOUTS:
            say(f"shift: {case}, {layout} layout")
            try:
                results += measure(case, layout, threads, 5 if quick else 25)
            except ImportError as error:
                say(f"the {layout} layout is not measured: vLLM's CPU backend is not here ({error})")
    torch.set_num_threads(max(threads))
    show(results)
    return results


def show(results: Sequence[dict[str, Any]]) -> None:
    columns = ["memcpy", "shift", "shift + load", "in a pass", "begin"]
    rows = []
    for result in results:
        ratios = [str(Ratio(**result["time_over_time_of_load"][column])) for column in columns]
        case = Case(result["tokens"], result["heads"], result["dim"])
        load = f"{result['ms_per_layer']['load, turned']:.2f}"
        rows.append([str(case), result["layout"], str(result["threads"]), load, *ratios])
    print(f"\nTime of {LAYERS} layers over that of load_rows with rotation: median (quartiles) of paired runs; less is")
    print("better. begin: what a span costs once in a pass, whatever its layers.")
    print(table(["entry, heads x dim", "layout", "threads", "load ms/layer", *columns], rows), flush=True)
