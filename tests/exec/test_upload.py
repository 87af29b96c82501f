"""What goes between host memory and a device beside the device's other work. On a CPU nothing is copied or late."""

from collections.abc import Sequence

import pytest
import torch

from vlcache_connector.exec.late import Late
from vlcache_connector.exec.upload import Uploads

DEVICES = ["native-cpu", *(["native-cuda"] if torch.cuda.is_available() else [])]
LAYERS = 9


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param.removeprefix("native-"))


def entry_of(device: torch.device, num_tokens: int) -> torch.Tensor:
    """An entry [layers, 2, tokens, heads, dim] in host memory, as the slab holds it; each layer holds its number."""
    entry = torch.empty(LAYERS, 2, num_tokens, 2, 64, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
    return entry.copy_(torch.arange(LAYERS).view(-1, 1, 1, 1, 1).expand_as(entry))


def keep_busy(device: torch.device) -> None:
    """For some milliseconds, on a GPU: what is wrong with the order of streams then shows."""
    if device.type == "cuda":
        torch.cuda._sleep(10_000_000)


@pytest.mark.parametrize("asked", [range(LAYERS), [0, 3, 4, 8], [5], [2, 3]], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3000])
def test_layers_arrive_as_they_are_stored(device: torch.device, asked: Sequence[int], num_tokens: int) -> None:
    for _ in range(3):  # in memory that was used before
        torch.full((LAYERS, 2, num_tokens, 2, 64), -1.0, dtype=torch.bfloat16, device=device)
        keep_busy(device)
        uploads, found = Uploads(entry_of(device, num_tokens), device), []
        for layer in asked:
            rows = uploads[layer]
            keep_busy(device)
            found.append(torch.stack((rows.amin(), rows.amax())))
        assert [numbers.tolist() for numbers in found] == [[layer, layer] for layer in asked]


def test_memory_is_not_given_to_others_before_copies_are_done(device: torch.device) -> None:
    """A pass that ends early leaves layers on their way."""
    for _ in range(5):
        uploads = Uploads(entry_of(device, 3000), device)
        uploads[0]
        del uploads
        others = [torch.full((2, 3000, 2, 64), -1.0, dtype=torch.bfloat16, device=device) for _ in range(8)]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert all(bool((other == -1).all()) for other in others)


def test_answers_wait_for_copies_to_the_host(device: torch.device) -> None:
    late: Late[str] = Late(device)
    target = torch.zeros(1 << 22, pin_memory=device.type == "cuda")
    keep_busy(device)
    target.copy_(torch.ones(1 << 22, device=device), non_blocking=True)
    given = [late.exchange("written"), late.exchange(None), late.exchange(None)]
    assert given == (["written", None, None] if device.type == "cpu" else [None, "written", None])
    assert bool((target == 1).all())


def test_answers_wait_for_uploads(device: torch.device) -> None:
    """Whoever hears that an entry was read may write over it."""
    late: Late[str] = Late(device)
    entry = entry_of(device, 3000)
    keep_busy(device)
    uploads = Uploads(entry, device)
    late.exchange("read")
    late.exchange(None)
    if device.type == "cuda":
        entry.fill_(-1)
        assert float(uploads[1].float().amin()) == 1.0


def test_answers_are_taken_without_a_step(device: torch.device) -> None:
    late: Late[str] = Late(device)
    keep_busy(device)
    given = late.exchange("read")
    assert late.take(waits=False) is None  # not yet, or given at once
    assert late.take() == (None if device.type == "cpu" else "read") and late.take() is None
    assert given == ("read" if device.type == "cpu" else None)
