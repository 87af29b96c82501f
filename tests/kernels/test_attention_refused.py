"""Wrong arguments of sparse_query_attention: the error names the argument, and nothing was written."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.attention_cases import Case, build
from kernels.conftest import Implementation
from kernels.paged import as_bits
from vlcache_connector.kernels.ops import Strides

Call = dict[str, Any]
Change = Callable[[Call], Call]
OnTensor = Callable[[torch.Tensor], torch.Tensor]

QUERIES = ((0, 20), (1, 7), (0, 39), (1, 40), (0, 5))  # blocks of 16 tokens: 3 for each request
CASE = Case(QUERIES, torch.bfloat16)  # 2 KV heads, 4 query heads, 32 dimensions, 8 blocks


def tensor(name: str, change: OnTensor) -> Change:
    return lambda call: {**call, name: change(call[name])}


def query(change: OnTensor) -> Change:
    """With an `out` to match."""

    def apply(call: Call) -> Call:
        changed = change(call["query"])
        return {
            **call,
            "query": changed,
            "out": torch.full(changed.shape, 7.0, device=changed.device).to(changed.dtype),
        }

    return apply


def number(name: str, value: float) -> Change:
    return lambda call: {**call, name: value}


def layout(**changes: Any) -> Change:
    return lambda call: {**call, "layout": dataclasses.replace(call["layout"], **changes)}


def stride(half: str, **changes: int) -> Change:
    """Of keys or values: their origin or strides."""
    return lambda call: layout(**{half: getattr(call["layout"], half)._replace(**changes)})(call)


def order(change: OnTensor) -> Change:
    return lambda call: layout(order=change(call["layout"].order))(call)


def table_entry(request: int, block: int, value: int) -> Change:
    def change(table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        table[request, block] = value
        return table

    return tensor("block_table", change)


def with_value(place: int, value: int) -> OnTensor:
    return lambda tensor: tensor.index_fill(0, torch.tensor([place], device=tensor.device), value)


def every_second(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


# name of the case: (argument that the message names, form of the pages, change)
WRONG: dict[str, tuple[str, str, Change]] = {
    "query of float64": ("query", "engine", query(torch.Tensor.double)),
    "query of 8 bits": ("query", "engine", query(lambda t: t.to(torch.float8_e4m3fn))),
    "query of two dimensions": ("query", "engine", query(lambda t: t.flatten(1))),
    "query without heads": ("query", "engine", query(lambda t: t[:, :0])),
    "query without dimensions": ("query", "engine", query(lambda t: t[..., :0])),
    "query with gaps in its rows": ("query", "engine", query(every_second)),
    "query heads that cannot share": ("query", "engine", query(lambda t: t[:, 1:])),
    "query of other dimensions": ("cache", "engine", query(lambda t: t[..., :30])),
    "out of another type": ("out", "engine", tensor("out", torch.Tensor.float)),
    "out for fewer queries": ("out", "engine", tensor("out", lambda t: t[1:])),
    "out with gaps": ("out", "engine", tensor("out", every_second)),
    "cache of float64": ("cache", "engine", tensor("cache", torch.Tensor.double)),
    "cache of integers": ("cache", "engine", tensor("cache", as_bits)),
    "cache without dimensions": ("cache", "engine", tensor("cache", lambda t: t.flatten()[0])),
    "cache with smaller blocks": ("cache", "engine", tensor("cache", lambda t: t[:, :, 1:])),
    "block table of int64": ("block_table", "engine", tensor("block_table", torch.Tensor.long)),
    "block table in a row": ("block_table", "engine", tensor("block_table", torch.Tensor.flatten)),
    "block table with gaps": ("block_table", "engine", tensor("block_table", every_second)),
    "request of int64": ("request", "engine", tensor("request", torch.Tensor.long)),
    "too few requests": ("request", "engine", tensor("request", lambda t: t[1:])),
    "request with gaps": ("request", "engine", tensor("request", every_second)),
    "position of int64": ("position", "engine", tensor("position", torch.Tensor.long)),
    "too many positions": ("position", "engine", tensor("position", lambda t: torch.cat((t, t[:1])))),
    "position in a matrix": ("position", "engine", tensor("position", lambda t: t[None])),
    "scales without 8-bit pages": ("scales", "engine", lambda call: {**call, "scales": torch.ones(2)}),
    "block size of 0": ("block_size", "engine", layout(block_size=0)),
    "huge block size": ("block_size", "engine", layout(block_size=2**40)),
    "block size too large": ("cache", "engine", layout(block_size=17)),
    "seven numbers": ("layout", "engine", layout(keys=(0, 1, 1))),
    "strides of values alone": ("layout", "engine", layout(keys=None)),
    "strides beside a table": ("layout", "packed", layout(keys=Strides(0, 1, 1, 1), values=Strides(0, 1, 1, 1))),
    "negative origin": ("layout", "engine", stride("keys", origin=-1)),
    "keys behind the block": ("layout", "keys_transposed", stride("keys", origin=1025)),
    "values behind the block": ("layout", "keys_transposed", stride("values", origin=513)),
    "token stride too large": ("layout", "engine", stride("values", token=65)),
    "a product of 128 bits": ("layout", "engine", stride("keys", token=2**63 - 1)),
    "table of int64": ("order", "packed", order(torch.Tensor.long)),
    "table too short": ("order", "packed", order(lambda t: t[2:])),
    "table with gaps": ("order", "packed", order(every_second)),
    "scale that is no number": ("softmax_scale", "engine", number("softmax_scale", math.nan)),
    "scale too large for float32": ("softmax_scale", "engine", number("softmax_scale", 1e39)),
    "negative window": ("window", "engine", number("window", -1)),
    "negative soft cap": ("soft_cap", "engine", number("soft_cap", -0.5)),
    "infinite soft cap": ("soft_cap", "engine", number("soft_cap", math.inf)),
    "soft cap that is no number": ("soft_cap", "engine", number("soft_cap", math.nan)),
}
WRONG_SCALES: dict[str, tuple[str, str, Change]] = {
    "scales of float64": ("scales", "engine", tensor("scales", torch.Tensor.double)),
    "a single scale": ("scales", "engine", tensor("scales", lambda t: t[:1])),
    "scales with gaps": ("scales", "engine", tensor("scales", every_second)),
}
WRONG_VALUES: dict[str, tuple[str, str, Change]] = {  # a GPU does not look at them
    "negative request": ("request", "engine", tensor("request", with_value(2, -1))),
    "request behind the table": ("request", "engine", tensor("request", with_value(4, 2))),
    "negative position": ("position", "engine", tensor("position", with_value(0, -1))),
    "position behind the table": ("position", "engine", tensor("position", with_value(3, 64))),
    "negative block": ("block_table", "engine", table_entry(0, 1, -1)),
    "block behind the cache": ("block_table", "engine", table_entry(1, 2, 8)),
    "no blocks at all": ("position", "engine", tensor("block_table", lambda t: t[:, :0].contiguous())),
    "no requests at all": ("request", "engine", tensor("block_table", lambda t: t[:0])),
    "no pages at all": ("block_table", "engine", tensor("cache", lambda t: t[:0])),
    "table entry behind the block": ("order", "packed", order(with_value(9, 2 * 16 * 2 * 32))),
    "negative table entry": ("order", "packed", order(with_value(-1, -1))),
}


def check_refusal(implementation: Implementation, wrong: tuple[str, str, Change], case: Case = CASE) -> None:
    argument, form, change = wrong
    problem = build(dataclasses.replace(case, form=form), implementation.device)
    before = as_bits(problem.memory).clone()
    call = change({**problem.arguments, "out": torch.full_like(problem.arguments["query"], 7.0)})
    with pytest.raises(RuntimeError) as raised:
        implementation.sparse_query_attention(**call)
    assert str(raised.value).startswith(f"{argument}: expected "), raised.value
    assert bool((call["out"].float() == 7).all()), "out was written"
    assert torch.equal(as_bits(problem.memory), before), "pages were written"


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(implementation: Implementation, wrong: Any) -> None:
    check_refusal(implementation, wrong)


@pytest.mark.parametrize("wrong", WRONG_SCALES.values(), ids=WRONG_SCALES)
def test_wrong_scales_are_named(implementation: Implementation, wrong: Any) -> None:
    case = dataclasses.replace(CASE, page_dtype=torch.float8_e4m3fn, scales=(0.5, 2.0))
    check_refusal(implementation, wrong, case)


@pytest.mark.parametrize("wrong", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_wrong_value_is_named(implementation: Implementation, wrong: Any) -> None:
    if implementation.device.type == "cpu":
        check_refusal(implementation, wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("argument", ["out", "cache", "block_table", "request", "position", "order"])
def test_an_argument_on_another_device_is_named(implementation: Implementation, argument: str) -> None:
    """The implementation of the GPU is called as soon as one argument is there."""
    if implementation.device.type == "cpu":
        return
    move = order(torch.Tensor.cpu) if argument == "order" else tensor(argument, torch.Tensor.cpu)
    check_refusal(implementation, (argument, "packed", move))


def test_blocks_before_every_window_may_be_gone(implementation: Implementation) -> None:
    """`build` leaves nonsense there; this makes sure that it does, so that other tests mean something."""
    problem = build(dataclasses.replace(CASE, queries=((0, 47), (0, 40)), window=5), implementation.device)
    assert problem.arguments["block_table"][0, :2].tolist() != [0, 0]
    assert not 0 <= int(problem.arguments["block_table"][0, 0]) < 5
    assert problem.attend(implementation.sparse_query_attention).isfinite().all()


def test_the_message_says_what_was_expected_and_what_was_found(implementation: Implementation) -> None:
    problem = build(CASE, implementation.device)
    asked = problem.arguments["query"]
    with pytest.raises(RuntimeError, match=r"^position: expected shape \[5\], found \[4\]$"):
        problem.attend(implementation.sparse_query_attention, position=problem.arguments["position"][1:])
    with pytest.raises(RuntimeError, match=r"^query: expected a multiple of the 2 KV heads of cache, found 3 heads$"):
        problem.attend(implementation.sparse_query_attention, query=asked[:, 1:])
    room = r"2 \* 16 \(block_size\) \* heads \* 31 \(dimensions of query\) elements of a block, found 2048"
    with pytest.raises(RuntimeError, match=rf"^cache: expected {room}$"):
        problem.attend(implementation.sparse_query_attention, query=asked[..., 1:])
