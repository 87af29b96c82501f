"""sparse_query_attention on a GPU beside PyTorch's attention over keys and values that were gathered from the pages
before, and beside FlashAttention 3 as vLLM calls it, where it is installed: there every run of queries is a sequence.
`gpu.py` runs this. Shapes of Qwen3-VL-8B: 32 query heads, 8 KV heads of 128 dimensions, bfloat16.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu_clock import Clock
from bench.interleaved import Ratio, ratio
from bench.results import say, table
from vlcache_connector.kernels.ops import PageLayout, Strides, sparse_query_attention

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Case:
    """`queries` positions of each of `requests` requests of `context` tokens: scattered, or the last ones."""

    context: int
    queries: int
    is_scattered: bool = True
    requests: int = 1
    heads: int = 8
    group: int = 4
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        what = "scattered" if self.is_scattered else "at the end"
        return f"{self.requests} x {self.queries} {what} of {self.context}"

    def positions(self) -> list[int]:
        """Of one request, ascending."""
        if self.is_scattered:
            return sorted(random.Random(0).sample(range(self.context), self.queries))
        return list(range(self.context - self.queries, self.context))


CASES = [
    Case(2048, 102),
    Case(8192, 64),
    Case(8192, 410),
    Case(20480, 1024),
    Case(8192, 410, requests=4),
    Case(8192, 410, is_scattered=False),
    Case(20480, 1024, is_scattered=False),
]
REHEARSED = [Case(300, 20, heads=2, group=2, dim=64), Case(200, 16, is_scattered=False, requests=2, heads=2, dim=64)]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    case: Case
    cache: torch.Tensor  # [block, head, token, K and V]
    table: torch.Tensor
    query: torch.Tensor  # [requests * queries, query heads, dim]
    position: torch.Tensor  # [queries]

    def ours(self) -> torch.Tensor:
        case = self.case
        size = BLOCK_SIZE * 2 * case.dim
        layout = PageLayout.alike(BLOCK_SIZE, Strides(0, 2 * case.dim, size, 1), case.dim)
        request = torch.arange(case.requests, device=self.query.device, dtype=torch.int32)
        return sparse_query_attention(
            self.query,
            self.cache,
            self.table,
            request.repeat_interleave(case.queries),
            self.position.repeat(case.requests),
            layout,
            softmax_scale=case.dim**-0.5,
        )

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [requests, query heads, context, dim], repeated for each query head."""
        case = self.case
        rows = self.cache[self.table.long()].transpose(2, 3).flatten(1, 2)[:, : case.context].transpose(1, 2)
        keys, values = rows.repeat_interleave(case.group, dim=1).split(case.dim, dim=-1)
        return keys.contiguous(), values.contiguous()

    def pytorchs(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = self.query.unflatten(0, (self.case.requests, -1)).transpose(1, 2)
        out = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)

    def engines(self) -> Callable[[], torch.Tensor] | None:
        """The engine's attention, its arguments prepared; None where it is not installed."""
        if self.query.device.type != "cuda" or find_spec("vllm") is None:
            return None
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        case, device = self.case, self.query.device
        ends = [position + 1 for position in case.positions()]
        per_request = 1 if case.is_scattered else case.queries
        lengths = torch.tensor((ends if case.is_scattered else ends[-1:]) * case.requests, dtype=torch.int32)
        starts = torch.arange(0, len(self.query) + 1, per_request, dtype=torch.int32)
        return partial(
            flash_attn_varlen_func,
            self.query,
            *self.cache.transpose(1, 2).split(case.dim, dim=-1),
            max_seqlen_q=per_request,
            cu_seqlens_q=starts.to(device),
            max_seqlen_k=max(ends),
            seqused_k=lengths.to(device),
            block_table=self.table.repeat_interleave(len(lengths) // case.requests, dim=0),
            softmax_scale=case.dim**-0.5,
            causal=True,
            fa_version=3,
        )

    def mask(self) -> torch.Tensor:
        return torch.arange(self.case.context, device=self.query.device) <= self.position[:, None]


def work_of(case: Case, device: torch.device) -> Work:
    blocks = -(-case.context // BLOCK_SIZE)
    shape = case.requests * blocks + 3, case.heads, BLOCK_SIZE, 2 * case.dim
    table_ids = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))[: case.requests * blocks]
    queries = case.requests * case.queries, case.heads * case.group, case.dim
    return Work(
        case,
        torch.randn(shape, device=device, dtype=case.dtype),
        table_ids.view(case.requests, blocks).int().to(device),
        torch.randn(queries, device=device, dtype=case.dtype),
        torch.tensor(case.positions(), dtype=torch.int32, device=device),
    )


def measure(case: Case, clock: Clock, device: torch.device, repeats: int) -> dict[str, Any]:
    """Raises `RuntimeError` when the two disagree."""
    work = work_of(case, device)
    keys, values = work.gathered()
    mask = work.mask()
    others = {"PyTorch": lambda: work.pytorchs(keys, values, mask), "FlashAttention 3": work.engines()}
    functions: dict[str, Callable[[], Any]] = {name: other for name, other in others.items() if other is not None}
    # Averages of normal values are below 8; on each side, weights and result are rounded by half a unit of that.
    ours = work.ours().float()
    worst = {name: float((ours - other().float()).abs().max()) for name, other in functions.items()}
    if not max(worst.values()) <= 8 * torch.finfo(case.dtype).eps:
        raise RuntimeError(f"{case}: differs too much from another: {worst}")
    functions |= {"ours": work.ours, "PyTorch and gathering": lambda: work.pytorchs(*work.gathered(), mask)}
    times = clock.on_device_in_turns(functions, repeats)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    products = 4 * case.dim * case.heads * case.group * case.requests * sum(p + 1 for p in case.positions())
    return {
        **{name: str(value) if name == "dtype" else value for name, value in asdict(case).items()},
        "repeats": repeats,
        "worst_difference": worst,
        "median_s": seconds,
        "tflop_per_s": 1e-12 * products / seconds["ours"],
        "time_over_ours": {name: asdict(ratio(times[name], times["ours"])) for name in functions if name != "ours"},
    }


def run(device: torch.device, *, rehearse: bool) -> list[dict[str, Any]]:
    """Measures all cases and prints a table."""
    clock, results = Clock(device), []
    cases = REHEARSED if rehearse else CASES
    for case in cases:
        results.append(measure(case, clock, device, 3 if rehearse else 20))
        say(f"attention: {case} measured")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show([str(case) for case in cases], results)
    return results


def show(titles: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    rows = []
    for title, result in zip(titles, results, strict=True):
        ratios = [str(Ratio(**value)) for value in result["time_over_ours"].values()]
        rows.append([title, f"{1e6 * result['median_s']['ours']:.0f}", f"{result['tflop_per_s']:.0f}", *ratios])
    print("\nAttention: how many times as long others take, median (quartiles) of runs in turns; more is better.")
    print(table(["queries", "ours [us]", "TFLOP/s", *results[0]["time_over_ours"]], rows), flush=True)
