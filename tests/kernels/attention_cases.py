"""Problems for sparse_query_attention, their answers in fp64, and how far from them a result may be.

All memory of a cache is NaN but for the keys and values that some query sees, and block tables say nonsense about
blocks that no query needs.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from kernels.paged import FORMS, Form, Sizes, as_bits, random_values

UNIT = 2.0**-24  # relative error of one rounding to fp32
_GUARD = 64  # elements before and behind each cache

Query = tuple[int, int]
"""Request, position."""


@dataclass(frozen=True, slots=True)
class Case:
    """Queries against requests of just enough tokens for them."""

    queries: tuple[Query, ...]
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None  # None: that of the queries
    form: str = "engine"
    heads: int = 2
    group: int = 2  # query heads per KV head
    dim: int = 32
    block_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    scales: tuple[float, float] | None = None
    spread: float = 1.0  # of the queries' elements: large ones make sharp distributions
    nan_keys: tuple[int, ...] = ()  # positions whose keys are NaN, in every request
    nan_values: tuple[int, ...] = ()
    num_infinite: int = 0  # so many keys, the first of each request, have a score of minus infinity for every query

    @property
    def num_requests(self) -> int:
        return 1 + max((request for request, _ in self.queries), default=0)

    @property
    def softmax_scale(self) -> float:
        return float(self.dim**-0.5)

    def lowest_key(self, position: int) -> int:
        return max(0, position - self.window + 1) if self.window else 0

    def seen(self, request: int) -> torch.Tensor:
        """Positions of the request's keys that some query sees, ascending."""
        keys: set[int] = set()
        for _, position in (query for query in self.queries if query[0] == request):
            keys.update(range(self.lowest_key(position), position + 1))
        return torch.tensor(sorted(keys), dtype=torch.int64)


def scattered(lengths: list[int], count: int, seed: int = 0) -> tuple[Query, ...]:
    """`count` queries of each request, in no order, requests mixed, some twice."""
    chance = random.Random(seed)
    queries = [(request, chance.randrange(length)) for request, length in enumerate(lengths) for _ in range(count)]
    chance.shuffle(queries)
    return tuple(queries)


def run(request: int, start: int, end: int) -> tuple[Query, ...]:
    return tuple((request, position) for position in range(start, end))


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Tensors of a case on a device."""

    case: Case
    memory: torch.Tensor  # of the cache and its neighbourhood
    arguments: dict[str, Any]  # of `ops.sparse_query_attention`, `out` excepted

    def attend(self, function: Callable[..., torch.Tensor], **changes: Any) -> torch.Tensor:
        return function(**{**self.arguments, **changes})


def queries_of(case: Case) -> torch.Tensor:
    shape = len(case.queries), case.heads * case.group, case.dim
    queries = (random_values(shape, torch.float32, seed=1) * case.spread).to(case.dtype)
    if case.num_infinite:
        queries[..., 0] = 1.0
    return queries


def stored_of(case: Case, request: int) -> torch.Tensor:
    """What pages hold of a request: [2, tokens, heads, dim] in their type."""
    length = 1 + max((p for r, p in case.queries if r == request), default=-1)
    values = random_values((2, length, case.heads, case.dim), torch.float32, seed=2 + request)
    scales = torch.tensor(case.scales or (1.0, 1.0)).view(2, 1, 1, 1)
    rows = (values / scales).to(case.page_dtype or case.dtype)
    rows[0, : case.num_infinite, :, 0] = -torch.inf
    for kv, positions in enumerate((case.nan_keys, case.nan_values)):
        rows[kv, list(positions)] = torch.nan
    return rows


def build(case: Case, device: torch.device) -> Problem:
    contents = [stored_of(case, request) for request in range(case.num_requests)]
    covered = [-(-rows.shape[1] // case.block_size) for rows in contents]
    sizes = Sizes(1, 0, case.heads, case.dim, sum(covered) + 2, case.block_size)
    form = FORMS[case.form](sizes)
    memory = _nan_memory(form, contents[0].dtype)
    table = _nonsense(case.num_requests, max(covered) + 1)
    unused = random.Random(3).sample(range(sizes.num_blocks), sizes.num_blocks)
    for request, rows in enumerate(contents):
        blocks = torch.tensor([unused.pop() for _ in range(covered[request])], dtype=torch.int32)
        seen = case.seen(request)
        if len(seen):
            first, end = int(seen[0]) // case.block_size, int(seen[-1]) // case.block_size + 1
            table[request, first:end] = blocks[first:end]
            _write(memory, form, rows[:, seen], blocks[seen // case.block_size].long(), seen % case.block_size)
    memory = memory.to(device)
    places = torch.tensor(case.queries, dtype=torch.int32, device=device).view(-1, 2)
    arguments = {
        "query": queries_of(case).to(device),
        "cache": _cache_in(memory, form),
        "block_table": table.to(device),
        "request": places[:, 0].contiguous(),
        "position": places[:, 1].contiguous(),
        "layout": form.layout(case.block_size, device),
        "softmax_scale": case.softmax_scale,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "scales": None if case.scales is None else torch.tensor(case.scales, device=device),
    }
    return Problem(case, memory, arguments)


def exact(case: Case) -> tuple[torch.Tensor, float]:
    """The answer, in fp64, by the definition: one query at a time; and the size of the largest score."""
    key_scale, value_scale = torch.tensor(case.scales or (1.0, 1.0)).tolist()
    pages = [stored_of(case, request).double() for request in range(case.num_requests)]
    pages = [rows.repeat_interleave(case.group, dim=2) for rows in pages]  # a KV head for each query head
    queries = queries_of(case).double()
    out, largest = torch.empty_like(queries), 0.0
    for i, (request, position) in enumerate(case.queries):
        keys, values = pages[request][:, case.lowest_key(position) : position + 1]
        scores = (keys * queries[i]).sum(dim=-1) * key_scale * case.softmax_scale
        if case.soft_cap:
            scores = case.soft_cap * (scores / case.soft_cap).tanh()
        weights = (scores - scores.amax(dim=0)).exp()
        out[i] = (weights.unsqueeze(-1) * values).sum(dim=0) * value_scale / weights.sum(dim=0).unsqueeze(-1)
        largest = max(largest, float(scores[scores.isfinite()].abs().max()))
    return out, largest


def by_pytorch(case: Case, rounds_weights: bool, seed: int) -> torch.Tensor:
    """The same in the precision of an ordinary implementation: inputs as they are stored, products and softmax in fp32,
    the weights rounded to the type of the queries where tensor cores need that, the result rounded once. `seed` chooses
    an order for all sums.
    """
    generator = torch.Generator().manual_seed(seed)
    dims = torch.randperm(case.dim, generator=generator)
    queries = queries_of(case).float().unflatten(1, (case.heads, case.group))[..., dims]
    scales = torch.tensor(case.scales or (1.0, 1.0)).view(2, 1, 1, 1)
    out = torch.empty_like(queries)
    pages = [stored_of(case, request).float() * scales for request in range(case.num_requests)]
    for i, (request, position) in enumerate(case.queries):
        first = case.lowest_key(position)
        seen = first + torch.randperm(position + 1 - first, generator=generator)
        keys, values = pages[request][:, seen].transpose(1, 2)
        scores = queries[i] @ keys[..., dims].transpose(1, 2) * case.softmax_scale
        if case.soft_cap:
            scores = case.soft_cap * (scores / case.soft_cap).tanh()
        weights = scores.softmax(dim=-1)
        out[i] = (weights.to(case.dtype).float() if rounds_weights else weights) @ values
    return out.flatten(1, 2).to(case.dtype)


@cache
def answer(case: Case, rounds_weights: bool = False) -> tuple[torch.Tensor, float]:
    """The exact answer, and how far from it a result may be: twice as far as PyTorch's, for the worst of three orders
    of its sums (its largest error depends on luck). Where even that is almost exact, one rounding of the largest score
    in fp32 (which changes a weight by so much of itself) and one of the result.
    """
    if not case.queries:
        return queries_of(case).double(), 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: on a busy machine, threads would mostly wait for each other
    wanted, largest = exact(case)
    errors = [(by_pytorch(case, rounds_weights, seed).double() - wanted).abs().max() for seed in range(3)]
    torch.set_num_threads(threads)
    return wanted, 2 * float(max(errors)) + UNIT * (1 + largest) * float(wanted.abs().max())


def _nan_memory(form: Form, dtype: torch.dtype) -> torch.Tensor:
    nbytes = (math.prod(form.base) + 2 * _GUARD) * dtype.itemsize
    memory = torch.full((nbytes,), 255, dtype=torch.uint8).view(dtype)
    assert memory.float().isnan().all()
    return memory


def _cache_in(memory: torch.Tensor, form: Form) -> torch.Tensor:
    return form.view(memory[_GUARD:-_GUARD].view(form.base))


def _write(memory: torch.Tensor, form: Form, rows: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> None:
    """Rows [2, n, heads, dim] into tokens (block, offset)."""
    _, _, heads, dim = rows.shape
    kv, head = torch.arange(2).view(2, 1, 1, 1), torch.arange(heads).view(-1, 1)
    index = torch.broadcast_tensors(blocks.view(-1, 1, 1), kv, offsets.view(-1, 1, 1), head, torch.arange(dim))
    as_bits(_cache_in(memory, form))[form.element(tuple(index))] = as_bits(rows)


def _nonsense(rows: int, columns: int) -> torch.Tensor:
    choices = torch.tensor([-1, 2**31 - 1, -(2**31), 10**6], dtype=torch.int32)
    return choices[torch.randint(len(choices), (rows, columns), generator=torch.Generator().manual_seed(4))]
