"""A digest of what load_rows and save_rows compute, the same for every correct implementation. Run as a module it
prints the instruction set in use and the digest of the compiled operations (the set is chosen once per process).
"""

import hashlib
from collections.abc import Callable

import torch

from kernels.paged import DTYPES, FLOAT8, Sizes, paged, random_bits, some_slots
from vlcache_connector.kernels import library, ops

Function = Callable[..., None]

FORMS = ["engine", "dim_strided", "packed"]
SIZES = Sizes(tokens=9, heads=2, dim=86)  # pairs in whole vectors of 4, 8 or 16, and a rest
ROTARY_DIM = 82


def digest(load_rows: Function, save_rows: Function) -> str:
    """Over all memory of all caches and entries. Products and sums are exact in fp32, so that it makes no difference
    whether they are fused.
    """
    found = hashlib.sha256()
    for form in FORMS:
        for dtype in DTYPES:
            for staged in [dtype, torch.float16, torch.bfloat16, torch.float32] if dtype in FLOAT8 else [dtype]:
                for memory in _results(load_rows, save_rows, form, dtype, staged):
                    found.update(memory.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _results(
    load_rows: Function, save_rows: Function, form: str, dtype: torch.dtype, staged: torch.dtype
) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []
    slots = some_slots(SIZES)
    scales = torch.tensor([[0.25, 2e-4], [0.007, 128.0]]) if dtype != staged else None
    small = torch.randint(-15, 16, SIZES.entry_shape, generator=torch.Generator().manual_seed(11))
    turns = torch.randint(-64, 65, (2, ROTARY_DIM // 2), generator=torch.Generator().manual_seed(12)) / 64
    entry = small.to(staged)
    for is_neox in (True, False):
        pages = paged(form, SIZES, dtype, torch.device("cpu"))
        load_rows(entry, pages.caches, slots, pages.layout, turns=turns, is_neox=is_neox, scales=scales)
        saved = torch.zeros(SIZES.entry_shape, dtype=staged)
        save_rows(saved, pages.caches, slots, pages.layout, scales=scales)
        results += [*pages.memory, saved]
    if dtype == staged:
        pages = paged(form, SIZES, dtype, torch.device("cpu"))
        load_rows(random_bits(SIZES.entry_shape, dtype), pages.caches, slots, pages.layout)
        results += pages.memory
    return results


if __name__ == "__main__":
    print(library.cpu_isa(), digest(ops.load_rows, ops.save_rows))
