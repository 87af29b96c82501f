"""load_rows and save_rows as copies: bit for bit, in every page layout and type, and nothing else is touched."""

import pytest
import torch

from kernels.conftest import Implementation
from kernels.paged import DTYPES, FORMS, Paged, Sizes, as_bits, kept_tokens, paged, random_bits, some_slots

every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

AWKWARD_SIZES = [
    Sizes(heads=1, dim=80, tokens=7),
    Sizes(heads=2, dim=96, tokens=1),
    Sizes(heads=5, dim=112),
    Sizes(heads=3, dim=33, block_size=3, num_blocks=7),
    Sizes(heads=1, dim=1, tokens=5),
    Sizes(num_blocks=1, block_size=16, tokens=16),
    Sizes(block_size=1, num_blocks=20),
]
LARGE_SIZES = [  # more than one thread's share: of one layer, and across layers
    Sizes(layers=1, heads=8, dim=128, block_size=128, num_blocks=2, tokens=171),
    Sizes(layers=5, heads=2, dim=64, block_size=16, num_blocks=12, tokens=171),
]


def assert_memory_is(pages: Paged, wanted: list[torch.Tensor]) -> None:
    for layer, memory in enumerate(pages.memory):
        assert torch.equal(memory.cpu(), wanted[layer].cpu()), f"layer {layer} differs"


def memory_with(pages: Paged, slots: torch.Tensor, entry: torch.Tensor) -> list[torch.Tensor]:
    bits, kept = as_bits(entry.cpu()), kept_tokens(slots)
    return [pages.with_rows(layer, kept, slots, bits[layer]) for layer in range(len(pages.memory))]


def check_copies(
    implementation: Implementation, form: str, sizes: Sizes, dtype: torch.dtype, slots: torch.Tensor | None = None
) -> None:
    """Loads random bits, compares all memory; saves them into other random bits, compares all of those."""
    device = implementation.device
    pages = paged(form, sizes, dtype, device)
    entry = random_bits(sizes.entry_shape, dtype).to(device)
    slots = (some_slots(sizes) if slots is None else slots).to(device)
    wanted = memory_with(pages, slots, entry)
    implementation.load_rows(entry, pages.caches, slots, pages.layout)
    assert_memory_is(pages, wanted)

    found = random_bits(sizes.entry_shape, dtype, seed=1).to(device)
    expected = as_bits(found).cpu().clone()
    expected[:, :, kept_tokens(slots)] = as_bits(entry.cpu())[:, :, kept_tokens(slots)]
    implementation.save_rows(found, pages.caches, slots, pages.layout)
    assert torch.equal(as_bits(found.cpu()), expected)
    assert_memory_is(pages, wanted)


@every_form
@every_dtype
def test_rows_are_copied_bit_for_bit_and_nothing_else_changes(
    implementation: Implementation, form: str, dtype: torch.dtype
) -> None:
    check_copies(implementation, form, Sizes(), dtype)


@pytest.mark.parametrize("sizes", AWKWARD_SIZES, ids=str)
@pytest.mark.parametrize("form", ["engine", "keys_transposed", "packed"])
def test_awkward_sizes_are_copied_like_others(implementation: Implementation, form: str, sizes: Sizes) -> None:
    check_copies(implementation, form, sizes, torch.bfloat16)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("sizes", LARGE_SIZES, ids=str)
@pytest.mark.parametrize("form", ["engine", "keys_transposed", "packed"])
def test_threads_share_the_rows(implementation: Implementation, form: str, sizes: Sizes) -> None:
    check_copies(implementation, form, sizes, torch.bfloat16)


@every_form
def test_saving_reads_what_the_pages_hold(implementation: Implementation, form: str) -> None:
    """`check_copies` would not notice a load and a save that are wrong in the same way outside the pages' view."""
    sizes = Sizes()
    pages = paged(form, sizes, torch.float16, implementation.device)
    slots = some_slots(sizes, num_skipped=0).to(implementation.device)
    entry = torch.zeros(sizes.entry_shape, dtype=torch.float16, device=implementation.device)
    implementation.save_rows(entry, pages.caches, slots, pages.layout)
    for layer in range(sizes.layers):
        rows = pages.rows(layer, kept_tokens(slots), slots)
        assert torch.equal(as_bits(entry[layer].cpu()), as_bits(rows))


def test_layers_may_lie_between_each_other(implementation: Implementation) -> None:
    """One tensor [block, layer, ...] for all layers: the blocks of a layer are far apart."""
    sizes = Sizes(layers=3)
    shape = sizes.num_blocks, sizes.layers, sizes.heads, sizes.block_size, 2 * sizes.dim
    memory = random_bits(shape, torch.bfloat16).to(implementation.device)
    wanted = as_bits(memory.cpu().clone())
    slots = some_slots(sizes)
    entry = random_bits(sizes.entry_shape, torch.bfloat16, seed=3)
    for token in kept_tokens(slots).tolist():
        block, offset = divmod(int(slots[token]), sizes.block_size)
        rows = as_bits(entry)[:, :, token]
        wanted[block, :, :, offset, : sizes.dim] = rows[:, 0]
        wanted[block, :, :, offset, sizes.dim :] = rows[:, 1]
    layout = paged("engine", sizes, torch.bfloat16, implementation.device).layout
    caches = [memory[:, layer] for layer in range(sizes.layers)]
    implementation.load_rows(entry.to(implementation.device), caches, slots.to(implementation.device), layout)
    assert torch.equal(as_bits(memory.cpu()), wanted)


@pytest.mark.parametrize("form", ["engine", "dim_strided", "keys_transposed", "packed"])
def test_an_entry_may_be_a_view_with_any_strides(implementation: Implementation, form: str) -> None:
    sizes = Sizes()
    layers, _, tokens, heads, dim = sizes.entry_shape
    memory = random_bits((tokens + 2, 2, heads, layers + 1, dim + 3), torch.bfloat16).to(implementation.device)
    view = memory[1:-1, :, :, 1:, 2:-1].permute(3, 1, 0, 2, 4)
    assert view.shape == sizes.entry_shape
    pages = paged(form, sizes, torch.bfloat16, implementation.device)
    slots = some_slots(sizes, num_skipped=0).to(implementation.device)
    wanted = memory_with(pages, slots, view.contiguous())
    implementation.load_rows(view, pages.caches, slots, pages.layout)
    assert_memory_is(pages, wanted)

    others = random_bits(view.shape, view.dtype, seed=4).to(view.device)
    implementation.load_rows(others, pages.caches, slots, pages.layout)
    expected = as_bits(memory).clone()
    expected[1:-1, :, :, 1:, 2:-1] = as_bits(others).permute(2, 1, 3, 0, 4)
    implementation.save_rows(view, pages.caches, slots, pages.layout)
    assert torch.equal(as_bits(memory), expected)


@every_form
def test_scatter_after_gather_is_the_identity(implementation: Implementation, form: str) -> None:
    sizes = Sizes()
    pages = paged(form, sizes, torch.bfloat16, implementation.device)
    before = pages.copy_of_memory()
    slots = some_slots(sizes).to(implementation.device)
    entry = random_bits(sizes.entry_shape, torch.bfloat16).to(implementation.device)
    implementation.save_rows(entry, pages.caches, slots, pages.layout)
    implementation.load_rows(entry, pages.caches, slots, pages.layout)
    assert_memory_is(pages, before)


@pytest.mark.parametrize(
    "sizes", [Sizes(tokens=0), Sizes(layers=0), Sizes(heads=0), Sizes(dim=0), Sizes(tokens=0, num_blocks=0)], ids=str
)
@pytest.mark.parametrize("form", ["engine", "keys_transposed", "packed"])
def test_nothing_to_move_is_no_error(implementation: Implementation, form: str, sizes: Sizes) -> None:
    pages = paged(form, sizes, torch.bfloat16, implementation.device)
    before = pages.copy_of_memory()
    entry = random_bits(sizes.entry_shape, torch.bfloat16).to(implementation.device)
    slots = some_slots(sizes).to(implementation.device)
    turns = torch.zeros(2, sizes.dim // 2, device=implementation.device)
    implementation.load_rows(entry, pages.caches, slots, pages.layout, turns=turns)
    implementation.save_rows(entry, pages.caches, slots, pages.layout)
    assert_memory_is(pages, before)


def test_tokens_without_a_slot_leave_pages_and_entry_alone(implementation: Implementation) -> None:
    sizes = Sizes()
    pages = paged("engine", sizes, torch.bfloat16, implementation.device)
    before = pages.copy_of_memory()
    entry = random_bits(sizes.entry_shape, torch.bfloat16).to(implementation.device)
    bits = as_bits(entry).clone()
    slots = torch.full((sizes.tokens,), -1, device=implementation.device)
    implementation.load_rows(entry, pages.caches, slots, pages.layout)
    implementation.save_rows(entry, pages.caches, slots, pages.layout)
    assert_memory_is(pages, before)
    assert torch.equal(as_bits(entry), bits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; elsewhere such slots are an error")
def test_a_gpu_passes_over_slots_outside_the_pages(implementation: Implementation) -> None:
    if implementation.device.type == "cpu":
        return
    sizes = Sizes()
    pages = paged("engine", sizes, torch.bfloat16, implementation.device)
    before = pages.copy_of_memory()
    entry = random_bits(sizes.entry_shape, torch.bfloat16).to(implementation.device)
    outside = [-2, sizes.num_blocks * sizes.block_size, 2**40, -(2**62)]
    slots = torch.tensor((outside * sizes.tokens)[: sizes.tokens], device=implementation.device)
    implementation.load_rows(entry, pages.caches, slots, pages.layout)
    assert_memory_is(pages, before)


def test_the_operations_pass_the_checks_of_torch(implementation: Implementation) -> None:
    if not implementation.is_native:
        return
    sizes = Sizes()
    pages = paged("engine", sizes, torch.bfloat16, implementation.device)
    entry = random_bits(sizes.entry_shape, torch.bfloat16).to(implementation.device)
    slots = some_slots(sizes).to(implementation.device)
    place = (pages.layout.block_size, pages.layout.numbers, pages.layout.order)
    turns = torch.zeros(2, sizes.dim // 2, device=implementation.device)
    torch.library.opcheck(torch.ops.vlcache.load_rows, (entry, pages.caches, slots, turns, True, None, *place))
    torch.library.opcheck(torch.ops.vlcache.save_rows, (entry, pages.caches, slots, None, *place))
