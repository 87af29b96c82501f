"""sparse_query_attention on the CPU beside the engine's attention; `bench_ops.py` runs this.

Both read the same pages, those of vLLM's CPU backend on this machine. The engine gets each run of neighbouring tokens
as one sequence, as a recompute pass would give it; its schedule is made once for all layers and is not in its time.
What the operation plans, it plans in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench.engine_pages import cache_update, halves, isa_of
from bench.interleaved import Ratio, ratio, times_in_turns
from bench.results import say, table
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.kernels.ops import sparse_query_attention
from vlcache_connector.types import Run

BLOCK_SIZE = 128
DTYPE = torch.bfloat16
IMAGES = 8  # that share a context, for runs of their first 5 %
FIRST_SHARE = 0.05
REPEATS = 5
LARGEST_DIFFERENCE = 4 * 2**-8  # of two results rounded to bfloat16, relative to the largest element


@dataclass(frozen=True, slots=True)
class Shape:
    query_heads: int
    kv_heads: int
    dim: int


@dataclass(frozen=True, slots=True)
class Case:
    shape: Shape
    context: int
    name: str  # of the set of tokens
    runs: tuple[Run, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(run) for run in self.runs)

    @property
    def flops(self) -> int:
        """Of the products; a token at position p sees p + 1 keys."""
        seen = sum(sum(range(run.start + 1, run.end + 1)) for run in self.runs)
        return 4 * seen * self.shape.query_heads * self.shape.dim


SHAPES = {Shape(16, 2, 64): (2048, 8192, 16384), Shape(32, 8, 128): (2048, 8192, 16384), Shape(16, 8, 128): (8192,)}
QUICK_SHAPES = {Shape(16, 2, 64): (2048,)}


def cases(shapes: dict[Shape, tuple[int, ...]]) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for shape, contexts in shapes.items():
        for context in contexts:
            image = context // IMAGES
            firsts = (Run(i * image, i * image + int(image * FIRST_SHARE)) for i in range(IMAGES))
            yield Case(shape, context, f"{IMAGES} images, first 5 %", tuple(firsts))
            yield Case(shape, context, "one run of 512", (Run(context - 512, context),))
            for count in (64, 256, 1024):
                tokens = torch.randperm(context, generator=generator)[:count].sort().values.tolist()
                yield Case(shape, context, f"{count} single tokens", tuple(Run(t, t + 1) for t in tokens))


class Engine:
    """vLLM's CPU attention, called as its backend does. Raises `ImportError` where there is none."""

    def __init__(self, case: Case, cache: torch.Tensor) -> None:
        self._isa = isa_of(DTYPE, BLOCK_SIZE, case.shape.dim)
        self._case = case
        self._cache = cache
        self.update = cache_update(self._isa)

    def attention(self, query: torch.Tensor, out: torch.Tensor, blocks: torch.Tensor) -> Callable[[], None]:
        """A call that attends for all runs of the case."""
        from vllm import _custom_ops

        case, runs = self._case, self._case.runs
        start = torch.tensor([0, *(len(run) for run in runs)]).cumsum(0).to(torch.int32)
        lengths = torch.tensor([run.end for run in runs], dtype=torch.int32)
        schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(runs),
            num_heads=case.shape.query_heads,
            num_kv_heads=case.shape.kv_heads,
            head_dim=case.shape.dim,
            seq_lens=lengths,
            dtype=DTYPE,
            query_start_loc=start,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=True,
        )
        return partial(
            _custom_ops.cpu_attention_with_kv_cache,
            query,
            *halves(self._cache),
            out,
            start,
            lengths,
            case.shape.dim**-0.5,
            True,
            None,
            -1,
            blocks.expand(len(runs), -1).contiguous(),
            0.0,
            schedule,
            None,
        )


def functions_of(case: Case) -> dict[str, Callable[[], object]]:
    """Raises `RuntimeError` when the results of both differ by more than rounding."""
    shape = case.shape
    generator = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, generator=generator)
    num_blocks = -(-case.context // BLOCK_SIZE)
    cache = torch.zeros(num_blocks + 2, shape.kv_heads, BLOCK_SIZE, 2 * shape.dim, dtype=DTYPE)
    engine = Engine(case, cache)
    pages = Pages([PagedLayer("", cache, engine.update)], BLOCK_SIZE, shape.kv_heads, shape.dim)
    for block in range(len(cache)):
        keys, values = normal(2, BLOCK_SIZE, shape.kv_heads, shape.dim).to(DTYPE)
        engine.update(keys, values, cache, torch.arange(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE))
    blocks = torch.randperm(len(cache), generator=generator)[None, :num_blocks].to(torch.int32)
    query = normal(case.num_tokens, shape.query_heads, shape.dim).to(DTYPE)
    outs = torch.empty_like(query), torch.empty_like(query)
    position = torch.cat([torch.arange(run.start, run.end) for run in case.runs]).to(torch.int32)
    ours = partial(
        sparse_query_attention,
        query,
        cache,
        blocks,
        torch.zeros_like(position),
        position,
        pages.layout,
        softmax_scale=shape.dim**-0.5,
        out=outs[1],
    )
    functions: dict[str, Callable[[], object]] = {"engine": engine.attention(query, outs[0], blocks), "ours": ours}
    for function in functions.values():
        function()
    largest = float((outs[0].float() - outs[1].float()).abs().max() / outs[0].abs().max())
    if largest > LARGEST_DIFFERENCE:
        raise RuntimeError(f"{case}: the results differ by {largest} of their largest element")
    return functions


def measure(case: Case, threads: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One result for each number of threads."""
    results = []
    for count in threads:
        torch.set_num_threads(count)
        times = times_in_turns(functions_of(case), repeats)
        seconds = sorted(times["ours"])[len(times["ours"]) // 2]
        results.append(
            {
                **asdict(case.shape),
                "context": case.context,
                "tokens": case.name,
                "num_tokens": case.num_tokens,
                "threads": count,
                "repeats": repeats,
                "ms": seconds * 1e3,
                "gflop_per_s": case.flops / seconds / 1e9,
                "engine_time_over_time": asdict(ratio(times["engine"], times["ours"])),
            }
        )
    return results


def run(threads: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Measures all cases and prints a table; nothing where vLLM's CPU attention is not installed."""
    results = []
    try:
        for case in cases(QUICK_SHAPES if quick else SHAPES):
            say(f"attention: {case.shape}, context {case.context}, {case.name}")
            results += measure(case, threads, 3 if quick else REPEATS)
    except ImportError as error:
        say(f"attention is not measured: vLLM's CPU attention, to compare with, is not here ({error})")
        return []
    torch.set_num_threads(max(threads))
    show(results)
    return results


def show(results: Sequence[dict[str, Any]]) -> None:
    rows = [
        [
            f"{result['query_heads']}/{result['kv_heads']} x {result['dim']}, {result['context']}: {result['tokens']}",
            str(result["threads"]),
            f"{result['ms']:.1f}",
            f"{result['gflop_per_s']:.0f}",
            str(Ratio(**result["engine_time_over_time"])),
        ]
        for result in results
    ]
    print("\nThe engine's time divided by the operation's: median (quartiles) of paired runs; more is better")
    print(table(["heads x dim, context: tokens", "threads", "ms", "GFLOP/s", "engine / ours"], rows), flush=True)
