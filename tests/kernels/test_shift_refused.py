"""Wrong arguments of shift_rows: the error names the argument, and nothing was written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.conftest import Implementation
from kernels.paged import as_bits, random_bits

TOKENS, HEADS, DIM, HALF = 5, 3, 20, 8

Change = Callable[[torch.Tensor], torch.Tensor]


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


# name of the case: (argument that is changed and that the message names, change)
WRONG: dict[str, tuple[str, Change]] = {
    "entry of float64": ("entry", lambda t: t.double()),
    "entry of integers": ("entry", as_bits),
    "entry of all layers": ("entry", lambda t: t[None]),
    "entry with three of K and V": ("entry", lambda t: torch.cat((t, t[:1]))),
    "entry with gaps in its rows": ("entry", with_gaps),
    "out of another type": ("out", lambda t: t.half()),
    "out of fewer tokens": ("out", lambda t: t[:, 1:]),
    "out of fewer dimensions": ("out", lambda t: t[0]),
    "out with gaps in its rows": ("out", with_gaps),
    "shift of another type": ("shift", lambda t: t.float()),
    "shift of keys alone": ("shift", lambda t: t[:1]),
    "shift of fewer tokens": ("shift", lambda t: t[:, 1:]),
    "shift of one change for all tokens, not expanded": ("shift", lambda t: t[:, 0]),
    "shift of too many heads": ("shift", lambda t: t.repeat(1, 1, 2, 1)),
    "shift of too few dimensions": ("shift", lambda t: t[..., 1:]),
    "shift with gaps in its rows": ("shift", with_gaps),
    "places of float64": ("places", lambda t: t.double()),
    "places of too few tokens": ("places", lambda t: t[1:]),
    "places without sines": ("places", lambda t: t[:, :1].contiguous()),
    "places of more than all dimensions": ("places", lambda t: t.repeat(1, 1, 2)),
    "places with gaps": ("places", with_gaps),
    "turns of bfloat16": ("turns", lambda t: t.bfloat16()),
    "turns without sines": ("turns", lambda t: t[:1]),
    "turns of fewer pairs than places": ("turns", lambda t: t[:, 1:].contiguous()),
    "turns of more pairs than places": ("turns", lambda t: t.repeat(1, 2)),
    "turns with gaps": ("turns", with_gaps),
}


def valid_call(device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "entry": random_bits((2, TOKENS, HEADS, DIM), torch.bfloat16).to(device),
        "out": random_bits((2, TOKENS, HEADS, DIM), torch.bfloat16, seed=1).to(device),
        "shift": torch.ones(2, TOKENS, HEADS, DIM, dtype=torch.bfloat16, device=device),
        "places": torch.ones(TOKENS, 2, HALF, device=device),
        "turns": torch.ones(2, HALF, device=device),
    }


def check_refusal(implementation: Implementation, argument: str, change: Change) -> None:
    call: dict[str, Any] = valid_call(implementation.device)
    call[argument] = change(call[argument])
    before = as_bits(call["out"]).clone()
    with pytest.raises(RuntimeError) as raised:
        implementation.shift_rows(**call)
    assert str(raised.value).startswith(f"{argument}: expected "), raised.value
    assert torch.equal(as_bits(call["out"]), before), "the result was written"


def test_the_call_that_is_changed_below_is_right(implementation: Implementation) -> None:
    call = valid_call(implementation.device)
    before = as_bits(call["out"]).clone()
    implementation.shift_rows(**call)
    assert not torch.equal(as_bits(call["out"]), before)


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(implementation: Implementation, case: tuple[str, Change]) -> None:
    check_refusal(implementation, *case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("argument", ["out", "shift", "places", "turns"])
def test_an_argument_on_another_device_is_named(implementation: Implementation, argument: str) -> None:
    """The implementation of the GPU is called as soon as one argument is there."""
    if implementation.device.type == "cuda":
        check_refusal(implementation, argument, lambda t: t.cpu())


def test_the_message_says_what_was_expected_and_what_was_found(implementation: Implementation) -> None:
    call: dict[str, Any] = valid_call(implementation.device)
    with pytest.raises(RuntimeError, match=r"^shift: expected shape \[2, 5, 3, 20\], found \[1, 5, 3, 20\]$"):
        implementation.shift_rows(**{**call, "shift": call["shift"][:1]})
    with pytest.raises(RuntimeError, match=r"^places: expected at most dim / 2 = 10 angles, found 16$"):
        implementation.shift_rows(**{**call, "places": call["places"].repeat(1, 1, 2)})
    with pytest.raises(RuntimeError, match=r"^out: expected bfloat16, found float16$"):
        implementation.shift_rows(**{**call, "out": call["out"].half()})
