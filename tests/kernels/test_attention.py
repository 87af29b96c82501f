"""sparse_query_attention against attention in fp64, one query at a time. What no query sees is NaN in all of
these tests (see `attention_cases`)."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from kernels.attention_cases import Case, Problem, answer, build, exact, run, scattered
from kernels.conftest import Implementation
from kernels.paged import DTYPES, FLOAT8, FORMS, as_bits

WIDE = [dtype for dtype in DTYPES if dtype not in FLOAT8]
MIXED = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
SCALES = (0.37, 2.9)

every_form = pytest.mark.parametrize("form", FORMS)


def check(implementation: Implementation, case: Case) -> None:
    problem = build(case, implementation.device)
    assert_exact_enough(implementation, problem, problem.attend(implementation.sparse_query_attention))


def assert_exact_enough(implementation: Implementation, problem: Problem, found: torch.Tensor) -> None:
    case = problem.case
    rounds_weights = implementation.is_native and implementation.device.type == "cuda"
    wanted, tolerance = answer(case, rounds_weights)
    assert found.dtype == case.dtype
    assert found.shape == wanted.shape
    error = (found.cpu().double() - wanted).abs()
    assert error.isfinite().all(), f"{(~error.isfinite()).sum()} of {error.numel()} results are not finite"
    if case.queries:
        assert error.max() <= tolerance, (
            f"error {error.max():.3g} at {error.argmax()}, expected {tolerance:.3g} at most"
        )


@pytest.mark.parametrize(("dtype", "page_dtype"), [*((t, t) for t in WIDE), *MIXED], ids=str)
def test_every_type_is_as_exact_as_pytorch(
    implementation: Implementation, dtype: torch.dtype, page_dtype: torch.dtype
) -> None:
    check(implementation, Case(scattered([90, 300], 20), dtype, page_dtype, dim=64))


@pytest.mark.parametrize("scales", [None, SCALES])
@pytest.mark.parametrize("page_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_pages_of_8_bits_are_read_with_their_scales(
    implementation: Implementation, dtype: torch.dtype, page_dtype: torch.dtype, scales: tuple[float, float] | None
) -> None:
    check(implementation, Case(scattered([150, 40], 15), dtype, page_dtype, scales=scales))


@every_form
@pytest.mark.parametrize("page_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_page_layout_gives_the_same(implementation: Implementation, form: str, page_dtype: torch.dtype) -> None:
    dtype = torch.bfloat16 if page_dtype in FLOAT8 else page_dtype
    scales = SCALES if page_dtype in FLOAT8 else None
    check(implementation, Case(scattered([150, 17], 12), dtype, page_dtype, form, heads=3, dim=40, scales=scales))


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (5, 1), (1, 6), (2, 7), (3, 8), (1, 9), (2, 16), (1, 300)])
def test_query_heads_share_kv_heads(implementation: Implementation, heads: int, group: int) -> None:
    check(implementation, Case(scattered([140, 30], 5), torch.bfloat16, heads=heads, group=group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["engine", "keys_transposed", "dim_strided"])
@pytest.mark.parametrize("dim", [1, 7, 33, 64, 80, 96, 112, 128, 160, 256])
def test_any_number_of_dimensions(implementation: Implementation, dim: int, form: str, dtype: torch.dtype) -> None:
    check(implementation, Case(scattered([140, 20], 6), dtype, form=form, dim=dim))


@pytest.mark.parametrize("form", ["engine", "keys_transposed", "packed"])
@pytest.mark.parametrize("block_size", [1, 3, 16, 100, 128, 272])
def test_any_block_size(implementation: Implementation, block_size: int, form: str) -> None:
    check(implementation, Case(scattered([400, 5], 10), torch.bfloat16, form=form, block_size=block_size))


@pytest.mark.parametrize("block_size", [16, 128])
def test_positions_at_borders_of_blocks(implementation: Implementation, block_size: int) -> None:
    """Also at those of the parts that implementations take at a time: powers of two."""
    borders = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 384, 511, 512]
    check(implementation, Case(tuple((0, border) for border in borders), torch.bfloat16, block_size=block_size))


@pytest.mark.parametrize("position", [0, 1, 15, 16, 127, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_query(implementation: Implementation, position: int, dtype: torch.dtype) -> None:
    check(implementation, Case(((0, position),), dtype))


@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 100, 128, 1000, 2**60])
@pytest.mark.parametrize("queries", [scattered([400, 30], 12), run(0, 90, 150)], ids=["scattered", "run"])
def test_a_window_hides_earlier_keys(
    implementation: Implementation, window: int, queries: tuple[tuple[int, int], ...]
) -> None:
    check(implementation, Case(queries, torch.bfloat16, window=window))


@pytest.mark.parametrize("spread", [0.01, 1.0, 60.0])
@pytest.mark.parametrize("soft_cap", [0.3, 5.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_capped_softly(
    implementation: Implementation, soft_cap: float, spread: float, dtype: torch.dtype
) -> None:
    check(implementation, Case(scattered([150, 30], 12), dtype, soft_cap=soft_cap, spread=spread))


@pytest.mark.parametrize("spread", [0.0, 8.0, 100.0])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_distributions_may_be_flat_or_sharp(implementation: Implementation, spread: float, dtype: torch.dtype) -> None:
    check(implementation, Case(scattered([300], 20), dtype, spread=spread))


@pytest.mark.usefixtures("two_threads")
def test_runs_of_many_requests_go_together(implementation: Implementation) -> None:
    queries = (*run(3, 0, 40), *run(0, 200, 230), *run(1, 5, 6), *run(0, 100, 120), *run(5, 64, 96), *run(2, 0, 1))
    check(implementation, Case(queries, torch.bfloat16, heads=2, group=4, dim=64))


@pytest.mark.usefixtures("two_threads")
def test_a_request_may_have_more_queries_than_a_tile(implementation: Implementation) -> None:
    check(implementation, Case((*run(0, 30, 190), *scattered([250], 90)), torch.bfloat16, heads=1, group=4))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("window", "spread"), [(0, 1.0), (2000, 1.0), (0, 100.0)])
def test_one_query_after_many_keys_is_shared_between_threads(
    implementation: Implementation, window: int, spread: float
) -> None:
    queries = ((0, 4099), (0, 4098))
    check(implementation, Case(queries, torch.bfloat16, dim=64, block_size=128, window=window, spread=spread))


@pytest.mark.usefixtures("two_threads")
def test_many_keys_and_some_requests_with_few(implementation: Implementation) -> None:
    queries = (*scattered([2500], 9), (1, 3), (2, 700))
    check(implementation, Case(queries, heads=2, group=3, block_size=128))


def test_no_queries_are_no_work(implementation: Implementation) -> None:
    check(implementation, Case(()))


def test_a_nan_shows_in_results_of_queries_that_see_it_and_in_no_others(implementation: Implementation) -> None:
    """Also where keys of several queries are read together. On a GPU, only keys that no query sees may be NaN."""
    if implementation.device.type == "cuda" and implementation.is_native:
        pytest.skip("the CUDA kernel multiplies each tile of values with the weights of all rows, and 0 * NaN is NaN")
    clean = Case(tuple((0, p) for p in (3, 40, 41, 140, 141, 150, 390)), torch.bfloat16, window=105)
    case = dataclasses.replace(clean, nan_keys=(41, 42), nan_values=(145,))
    wanted, _ = exact(case)
    assert wanted.isnan().flatten(1).all(1).tolist() == [False, False, True, True, True, True, False]
    found = build(case, implementation.device).attend(implementation.sparse_query_attention).cpu()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert (found.double() - wanted).nan_to_num().abs().max() <= answer(clean)[1]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_keys_with_a_score_of_minus_infinity_weigh_nothing(implementation: Implementation, dtype: torch.dtype) -> None:
    """Also when there are more of them than an implementation takes at a time."""
    check(implementation, Case(tuple((0, p) for p in (310, 400, 420)), dtype, num_infinite=300))


def test_nothing_is_written_but_the_result(implementation: Implementation) -> None:
    case = Case(scattered([100, 30], 11), torch.bfloat16, heads=3, dim=40)
    problem = build(case, implementation.device)
    before = as_bits(problem.memory).clone()
    around = torch.full((len(case.queries) + 2, 6, case.dim), 7.0, dtype=case.dtype, device=implementation.device)
    out = around[1:-1]
    returned = problem.attend(implementation.sparse_query_attention, out=out)
    assert returned.data_ptr() == out.data_ptr()
    assert_exact_enough(implementation, problem, out)
    assert torch.equal(as_bits(problem.memory), before)
    assert bool((around[0] == 7).all()) and bool((around[-1] == 7).all())


def test_queries_may_be_a_view_with_any_strides(implementation: Implementation) -> None:
    case = Case(scattered([100, 30], 11), torch.bfloat16)
    problem = build(case, implementation.device)
    query = problem.arguments["query"]
    memory = torch.full((query.shape[1] + 1, query.shape[0] + 2, case.dim + 5), torch.nan, dtype=query.dtype)
    view = memory.to(query.device)[1:, 1:-1, 3:-2].transpose(0, 1)
    view.copy_(query)
    found = problem.attend(implementation.sparse_query_attention, query=view)
    assert found.is_contiguous()
    assert_exact_enough(implementation, problem, found)


def test_the_operator_is_described_rightly(implementation: Implementation) -> None:
    problem = build(Case(scattered([40], 3), torch.bfloat16, soft_cap=3.0), implementation.device)
    given = problem.arguments
    tensors = [given[name] for name in ("query", "cache", "block_table", "request", "position", "scales")]
    layout = given["layout"]
    pages = layout.block_size, layout.numbers, layout.order
    out = torch.empty_like(given["query"])
    operator = torch.ops.vlcache.sparse_query_attention
    torch.library.opcheck(operator, (out, *tensors, *pages, given["softmax_scale"], 0, 3.0))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_is_as_exact(isa: str) -> None:
    environment = {**os.environ, "VLCACHE_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "kernels.attention_probe"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    used, share = answer.split()
    if used != isa:
        pytest.skip(f"this processor has no {isa}: run on one that has it")
    assert float(share) <= 1
