"""A digest of what load_rows, save_rows and shift_rows compute, the same for every correct implementation. Run as a
module it prints the instruction set in use and the digest of the compiled operations (the set is chosen once per
process).
"""

import hashlib
from collections.abc import Callable

import torch

from kernels.paged import DTYPES, FLOAT8, Sizes, paged, random_bits, slots_in_runs, some_slots
from vlcache_connector.kernels import library, ops

Function = Callable[..., None]
Shift = Callable[..., torch.Tensor]

FORMS = ["engine", "dim_strided", "keys_transposed", "packed"]
SIZES = Sizes(tokens=9, heads=2, dim=86)  # pairs in whole vectors of 4, 8 or 16, and a rest
LARGE = Sizes(tokens=150, heads=2, dim=86, block_size=40, num_blocks=9)  # squares of all sides, and less of them
ROTARY_DIM = 82


def digest(load_rows: Function, save_rows: Function, shift_rows: Shift) -> str:
    """Over all memory of all caches and entries. Products and sums are exact in fp32, so that it makes no difference
    whether they are fused.
    """
    found = hashlib.sha256()
    for form in FORMS:
        for dtype in DTYPES:
            for staged in [dtype, torch.float16, torch.bfloat16, torch.float32] if dtype in FLOAT8 else [dtype]:
                results = _results(load_rows, save_rows, form, dtype, staged, SIZES, some_slots(SIZES))
                if form == "keys_transposed":
                    results += _results(load_rows, save_rows, form, dtype, staged, LARGE, slots_in_runs(LARGE))
                for memory in results:
                    found.update(_bytes(memory))
    for dtype in DTYPES:
        for memory in _shifted(shift_rows, dtype):
            found.update(_bytes(memory))
    return found.hexdigest()


def _bytes(memory: torch.Tensor) -> bytes:
    return memory.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _shifted(shift_rows: Shift, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(13)
    entry = torch.randint(-15, 16, SIZES.entry_shape[1:], generator=generator).to(dtype)
    shift = torch.randint(-15, 16, SIZES.entry_shape[1:], generator=generator).to(dtype)
    angles = torch.randint(-64, 65, (SIZES.tokens + 1, 2, ROTARY_DIM // 2), generator=generator) / 64
    return [
        shift_rows(entry, shift, angles[1:], turns=turns, is_neox=is_neox)
        for turns in (None, angles[0])
        for is_neox in (True, False)
    ]


def _results(
    load_rows: Function,
    save_rows: Function,
    form: str,
    dtype: torch.dtype,
    staged: torch.dtype,
    sizes: Sizes,
    slots: torch.Tensor,
) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []
    scales = torch.tensor([[0.25, 2e-4], [0.007, 128.0]]) if dtype != staged else None
    small = torch.randint(-15, 16, sizes.entry_shape, generator=torch.Generator().manual_seed(11))
    turns = torch.randint(-64, 65, (2, ROTARY_DIM // 2), generator=torch.Generator().manual_seed(12)) / 64
    entry = small.to(staged)
    for is_neox in (True, False):
        pages = paged(form, sizes, dtype, torch.device("cpu"))
        load_rows(entry, pages.caches, slots, pages.layout, turns=turns, is_neox=is_neox, scales=scales)
        saved = torch.zeros(sizes.entry_shape, dtype=staged)
        save_rows(saved, pages.caches, slots, pages.layout, scales=scales)
        results += [*pages.memory, saved]
    if dtype == staged:
        pages = paged(form, sizes, dtype, torch.device("cpu"))
        load_rows(random_bits(sizes.entry_shape, dtype), pages.caches, slots, pages.layout)
        results += pages.memory
    return results


if __name__ == "__main__":
    print(library.cpu_isa(), digest(ops.load_rows, ops.save_rows, ops.shift_rows))
