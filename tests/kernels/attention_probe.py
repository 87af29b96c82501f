"""Run as a module: checks the compiled attention operation on cases that take every path through the CPU kernels. It
prints the instruction set in use (chosen once per process) and the largest error as a share of what is allowed.
"""

import torch

from kernels.attention_cases import Case, answer, build, run, scattered
from vlcache_connector.kernels import library, ops

QUERIES = (*scattered([300, 40], 6), *run(0, 120, 137))
BF16, FP8 = torch.bfloat16, torch.float8_e5m2

CASES = [
    *(Case(QUERIES, dtype, dim=dim) for dtype in (torch.float32, BF16, torch.float16) for dim in (33, 64, 80)),
    *(
        Case(QUERIES, BF16, form=form, dim=dim)
        for form in ("keys_transposed", "packed", "dim_strided")
        for dim in (33, 64)
    ),
    *(Case(QUERIES, form=form, dim=40) for form in ("keys_transposed", "packed")),
    *(Case(QUERIES, BF16, group=group) for group in (1, 7, 8, 13)),
    Case(QUERIES, BF16, FP8, scales=(0.4, 2.5), dim=72),
    Case(QUERIES, BF16, window=20),
    Case(QUERIES, soft_cap=2.0),
    Case(((0, 2047),), BF16, heads=1, dim=128, block_size=128),
]


def worst_error() -> float:
    """Of all cases, the largest error as a share of what is allowed; infinite where a result is not finite."""
    shares = [0.0]
    for case in CASES:
        wanted, tolerance = answer(case)
        found = build(case, torch.device("cpu")).attend(ops.sparse_query_attention).double()
        shares.append(float((found - wanted).abs().nan_to_num(nan=torch.inf).max()) / tolerance)
    return max(shares)


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(library.cpu_isa(), worst_error())
