"""Wrong arguments of load_rows and save_rows: the error names the argument, and nothing was written."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.conftest import Implementation
from kernels.paged import Paged, Sizes, as_bits, paged, random_bits, some_slots
from vlcache_connector.kernels.ops import Strides

Call = dict[str, Any]
Change = Callable[[Call], Call]

SIZES = Sizes()
BLOCK_ELEMENTS = 2 * SIZES.block_size * SIZES.heads * SIZES.dim


def valid_call(form: str, device: torch.device, page: torch.dtype, staged: torch.dtype) -> tuple[Paged, Call]:
    pages = paged(form, SIZES, page, device)
    scales = torch.ones(SIZES.layers, 2, device=device) if page != staged else None
    call = {
        "entry": random_bits(SIZES.entry_shape, staged).to(device),
        "caches": pages.caches,
        "slots": some_slots(SIZES).to(device),
        "layout": pages.layout,
        "scales": scales,
        "turns": torch.ones(2, SIZES.dim // 2, device=device),
    }
    return pages, call


def entry(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda call: {**call, "entry": change(call["entry"])}


def second_cache(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda call: {**call, "caches": [call["caches"][0], change(call["caches"][1])]}


def all_caches(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda call: {**call, "caches": [change(cache) for cache in call["caches"]]}


def slots(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda call: {**call, "slots": change(call["slots"])}


def turns(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda call: {**call, "turns": change(call["turns"])}


def scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda call: {**call, "scales": change(torch.ones(SIZES.layers, 2, device=call["slots"].device))}


def layout(**changes: Any) -> Change:
    return lambda call: {**call, "layout": dataclasses.replace(call["layout"], **changes)}


def stride(half: str, name: str, change: Callable[[int], int]) -> Change:
    """Of keys or values: their origin or a stride."""

    def apply(call: Call) -> Call:
        strides = getattr(call["layout"], half)
        return layout(**{half: strides._replace(**{name: change(getattr(strides, name))})})(call)

    return apply


def order(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda call: layout(order=change(call["layout"].order))(call)


def with_value(place: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([place], device=tensor.device), value)


def every_second(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


# name of the case: (argument that the message names, form of the pages, change)
WRONG: dict[str, tuple[str, str, Change]] = {
    "entry of float64": ("entry", "engine", entry(lambda t: t.double())),
    "entry of integers": ("entry", "engine", entry(as_bits)),
    "entry of another float": ("entry", "engine", entry(lambda t: t.half())),
    "entry of four dimensions": ("entry", "engine", entry(lambda t: t[0])),
    "entry of one layer": ("entry", "engine", entry(lambda t: t[:1])),
    "entry with three of K and V": ("entry", "engine", entry(lambda t: torch.cat((t, t[:, :1]), dim=1))),
    "entry with gaps in its rows": ("entry", "engine", entry(every_second)),
    "slots of int32": ("slots", "engine", slots(lambda t: t.int())),
    "too few slots": ("slots", "engine", slots(lambda t: t[1:])),
    "too many slots": ("slots", "engine", slots(lambda t: torch.cat((t, t[:1])))),
    "slots in a matrix": ("slots", "engine", slots(lambda t: t[None])),
    "slots with gaps": ("slots", "engine", slots(every_second)),
    "second cache of another type": ("caches[1]", "engine", second_cache(lambda t: t.half())),
    "second cache of fewer blocks": ("caches[1]", "engine", second_cache(lambda t: t[1:])),
    "second cache with other strides": ("caches[1]", "engine", second_cache(lambda t: t.repeat(1, 2, 1, 1))),
    "second cache with smaller blocks": ("layout", "engine", second_cache(lambda t: t[:, :, 1:])),
    "caches of integers": ("caches[0]", "engine", all_caches(as_bits)),
    "caches without dimensions": ("caches[0]", "engine", all_caches(lambda t: t.flatten()[0])),
    "more layers than fit into a call": ("caches", "engine", lambda call: {**call, "caches": call["caches"] * 129}),
    "block size of 0": ("block_size", "engine", layout(block_size=0)),
    "negative block size": ("block_size", "engine", layout(block_size=-4)),
    "huge block size": ("block_size", "engine", layout(block_size=2**40)),
    "block size too large": ("layout", "engine", layout(block_size=SIZES.block_size + 1)),
    "seven numbers": ("layout", "engine", layout(keys=(0, 1, 1))),
    "nine numbers": ("layout", "engine", layout(values=(0, 1, 1, 1, 1))),
    "strides beside a table": ("layout", "packed", layout(keys=Strides(0, 1, 1, 1), values=Strides(0, 1, 1, 1))),
    "strides of keys alone": ("layout", "engine", layout(values=None)),
    "neither strides nor a table": ("layout", "engine", layout(keys=None, values=None)),
    "negative origin of keys": ("layout", "engine", stride("keys", "origin", lambda n: n - 1)),
    "origin of values too large": ("layout", "engine", stride("values", "origin", lambda n: n + 1)),
    **{
        f"{name} stride of {half} too large ({form})": (
            "layout",
            form,
            stride(half, name, lambda n: n + BLOCK_ELEMENTS),
        )
        for name in ("token", "head", "dim")
        for half in ("keys", "values")
        for form in ("engine", "keys_transposed")
    },
    "head stride that falls": ("layout", "engine", stride("keys", "head", lambda n: -n)),
    "token stride that falls": ("layout", "keys_transposed", stride("keys", "token", lambda n: -n)),
    "a product of 128 bits": ("layout", "engine", stride("values", "token", lambda _: 2**63 - 1)),
    "the most negative stride": ("layout", "engine", stride("keys", "head", lambda _: -(2**63))),
    "table of int64": ("order", "packed", order(lambda t: t.long())),
    "table too short": ("order", "packed", order(lambda t: t[1:])),
    "table as a matrix": ("order", "packed", order(lambda t: t.view(2, -1))),
    "table with gaps": ("order", "packed", order(every_second)),
}
WRONG_TURNS: dict[str, tuple[str, str, Change]] = {
    "turns of bfloat16": ("turns", "engine", turns(lambda t: t.bfloat16())),
    "turns without sines": ("turns", "engine", turns(lambda t: t[:1])),
    "turns in a row": ("turns", "engine", turns(lambda t: t[0])),
    "turns of more than all dimensions": ("turns", "engine", turns(lambda t: torch.cat((t, t[:, :1]), dim=1))),
    "turns with gaps": ("turns", "engine", turns(every_second)),
}
WRONG_VALUES: dict[str, tuple[str, str, Change]] = {  # a GPU does not look at them
    "slot behind the pages": ("slots", "engine", slots(with_value(3, SIZES.num_blocks * SIZES.block_size))),
    "slot below -1": ("slots", "engine", slots(with_value(12, -2))),
    "huge slot": ("slots", "engine", slots(with_value(0, 2**62))),
    "table entry behind the block": ("order", "packed", order(with_value(5, BLOCK_ELEMENTS))),
    "table entry behind the blocks of the second cache": ("order", "packed", second_cache(lambda t: t[:, :-1])),
    "table entry behind the blocks of the first cache": (
        "order",
        "packed",
        lambda call: {**call, "caches": [call["caches"][0][:, :-1], call["caches"][1]]},
    ),
    "negative table entry": ("order", "packed", order(with_value(-1, -1))),
}
WRONG_SCALES: dict[str, tuple[str, str, Change]] = {
    "scales of float64": ("scales", "engine", scales(lambda t: t.double())),
    "scales of one layer": ("scales", "engine", scales(lambda t: t[:1])),
    "scales as a list": ("scales", "engine", scales(lambda t: t.flatten())),
    "scales with gaps": ("scales", "engine", scales(every_second)),
    "entry of the other 8-bit type": ("entry", "engine", entry(lambda t: t.to(torch.float8_e5m2))),
    "scales for equal types": ("scales", "engine", entry(lambda t: t.to(torch.float8_e4m3fn))),
}


def check_refusal(
    implementation: Implementation,
    case: tuple[str, str, Change],
    *,
    is_load: bool,
    page: torch.dtype = torch.bfloat16,
    staged: torch.dtype = torch.bfloat16,
) -> None:
    argument, form, change = case
    pages, call = valid_call(form, implementation.device, page, staged)
    before = pages.copy_of_memory()
    entry_before = as_bits(call["entry"]).clone()
    wrong = change(call)
    function = implementation.load_rows if is_load else implementation.save_rows
    if not is_load:
        del wrong["turns"]
    with pytest.raises(RuntimeError) as raised:
        function(wrong.pop("entry"), wrong.pop("caches"), wrong.pop("slots"), wrong.pop("layout"), **wrong)
    assert str(raised.value).startswith(f"{argument}: expected "), raised.value
    assert all(map(torch.equal, pages.memory, before)), "pages were written"
    assert torch.equal(as_bits(call["entry"]), entry_before), "the entry was written"


every_direction = pytest.mark.parametrize("is_load", [True, False], ids=["load", "save"])


@every_direction
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(implementation: Implementation, case: Any, is_load: bool) -> None:
    check_refusal(implementation, case, is_load=is_load)


@pytest.mark.parametrize("case", WRONG_TURNS.values(), ids=WRONG_TURNS)
def test_wrong_turns_are_named(implementation: Implementation, case: Any) -> None:
    check_refusal(implementation, case, is_load=True)


@every_direction
@pytest.mark.parametrize("case", WRONG_SCALES.values(), ids=WRONG_SCALES)
def test_wrong_scales_are_named(implementation: Implementation, case: Any, is_load: bool) -> None:
    check_refusal(implementation, case, is_load=is_load, page=torch.float8_e4m3fn, staged=torch.bfloat16)


@every_direction
def test_scales_without_eight_bit_pages_are_named(implementation: Implementation, is_load: bool) -> None:
    check_refusal(implementation, ("scales", "engine", scales(lambda t: t)), is_load=is_load)


@every_direction
@pytest.mark.parametrize("case", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_wrong_value_is_named(implementation: Implementation, case: Any, is_load: bool) -> None:
    if implementation.device.type == "cpu":
        check_refusal(implementation, case, is_load=is_load)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("argument", ["entry", "slots", "turns", "order"])
def test_an_argument_on_another_device_is_named(implementation: Implementation, argument: str) -> None:
    """The implementation of the GPU is called as soon as one argument is there."""
    if implementation.device.type == "cpu":
        return
    move = {"entry": entry, "slots": slots, "turns": turns, "order": order}[argument](lambda t: t.cpu())
    check_refusal(implementation, (argument, "packed", move), is_load=True)


def test_the_message_says_what_was_expected_and_what_was_found(implementation: Implementation) -> None:
    pages, call = valid_call("engine", implementation.device, torch.bfloat16, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"^slots: expected shape \[13\], found \[12\]$"):
        implementation.load_rows(call["entry"], pages.caches, call["slots"][1:], pages.layout)
    sizes = r"expected shape \[2, 2, any, any, any\], found \[1, 2, 13, 3, 20\]"
    with pytest.raises(RuntimeError, match=rf"^entry: {sizes}$"):
        implementation.load_rows(call["entry"][:1], pages.caches, call["slots"], pages.layout)
    with pytest.raises(RuntimeError, match=r"^slots: expected int64, found int32$"):
        implementation.load_rows(call["entry"], pages.caches, call["slots"].int(), pages.layout)
