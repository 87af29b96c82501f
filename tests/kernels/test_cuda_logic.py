"""The CUDA kernels on the CPU, every thread emulated: all tests of the operations, and those of what only they do.

This finds wrong indices, missing barriers and accesses outside of memory. It does not find what only a device has: code
that the compiler gets wrong, limits of a launch, asynchrony between launches, speed. `make gpu` is for that.
"""

import dataclasses
import inspect
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import cuda_emulation, test_attention, test_rows, test_rows_numbers, test_rows_turned, test_shift
from kernels.attention_cases import Case, answer, build, exact, run, scattered
from kernels.conftest import Implementation
from kernels.cuda_emulation import ROOT, Device, emulated_device
from kernels.paged import Sizes, as_bits, paged, random_bits, random_values
from vlcache_connector.kernels import ref
from vlcache_connector.kernels.ops import PageLayout, Strides

SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -g1 -fno-omit-frame-pointer"


def those_of(module: ModuleType) -> dict[str, Any]:
    """The tests of an implementation in another module; they run with the one of this module."""
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith("test_") and "implementation" in inspect.signature(value).parameters
    }


for module in (test_rows, test_rows_turned, test_rows_numbers, test_shift, test_attention):
    globals().update(those_of(module))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return emulated_device(tmp_path_factory.mktemp("cuda-emulation"))


@pytest.fixture
def gpu(emulated: Device) -> Device:
    emulated.reset()
    return emulated


@pytest.fixture
def implementation(gpu: Device) -> Implementation:
    rows = cuda_emulation.load_rows, cuda_emulation.save_rows, cuda_emulation.shift_rows
    return Implementation(torch.device("cpu"), False, *rows, cuda_emulation.sparse_query_attention)


ENGINE_SIZES = [
    Sizes(dim=64, tokens=40, num_blocks=9, block_size=8),
    Sizes(layers=1, heads=8, dim=128, tokens=100, num_blocks=7, block_size=16),
    Sizes(layers=3, heads=1, dim=72, tokens=19),  # 9 pieces in bfloat16: five threads, which do not divide a block
    Sizes(heads=5, dim=8, tokens=20),  # one piece
    Sizes(layers=1, heads=1, dim=256, tokens=3),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", ENGINE_SIZES, ids=str)
def test_rows_of_a_multiple_of_16_bytes_are_moved_16_bytes_at_a_time(
    implementation: Implementation, gpu: Device, sizes: Sizes, dtype: torch.dtype
) -> None:
    for form in ("engine", "kv_then_tokens", "token_major", "kv_outside", "backwards"):
        for gpu.seed in range(3):
            test_rows.check_copies(implementation, form, sizes, dtype)
        assert gpu.used_vectors


@pytest.mark.parametrize(
    ("form", "sizes", "dtype"),
    [
        ("engine", Sizes(dim=20), torch.bfloat16),
        ("engine", Sizes(dim=33), torch.float32),
        ("with_gaps", Sizes(dim=64), torch.bfloat16),
        ("dim_strided", Sizes(dim=64), torch.bfloat16),
        ("keys_transposed", Sizes(dim=64), torch.bfloat16),
        ("values_transposed", Sizes(dim=64), torch.bfloat16),
        ("packed", Sizes(dim=64), torch.bfloat16),
    ],
    ids=str,
)
def test_other_rows_are_moved_one_element_at_a_time(
    implementation: Implementation, gpu: Device, form: str, sizes: Sizes, dtype: torch.dtype
) -> None:
    gpu.used_vectors = 1
    test_rows.check_copies(implementation, form, sizes, dtype)
    assert not gpu.used_vectors


STRIDES = {"block": 400, "key origin": 8, "key token": 48, "key head": 16}
STRIDES |= {"value origin": 168, "value token": 40, "value head": 128, "entry layer": 800, "entry kv": 400}
STRIDES |= {"entry token": 40, "entry head": 16, "entry address": 0}


@pytest.mark.parametrize("odd", [None, *STRIDES])
def test_every_stride_and_address_must_allow_16_bytes_at_a_time(
    implementation: Implementation, gpu: Device, odd: str | None
) -> None:
    """Pages and entries full of gaps; of all distances between elements, one is a single element longer."""
    far = {name: stride + (name == odd) for name, stride in STRIDES.items()}
    layers, tokens, heads, dim, num_blocks, block_size = 2, 7, 2, 8, 4, 3
    pages = random_bits((layers, num_blocks * far["block"]), torch.bfloat16)
    caches = [memory.as_strided((num_blocks, 400), (far["block"], 1)) for memory in pages]
    memory = random_bits((layers * far["entry layer"] + 1,), torch.bfloat16)
    steps = (far["entry layer"], far["entry kv"], far["entry token"], far["entry head"], 1)
    entry = memory.as_strided((layers, 2, tokens, heads, dim), steps, far["entry address"])
    keys, values = (
        Strides(far[f"{half} origin"], far[f"{half} token"], far[f"{half} head"], 1) for half in ("key", "value")
    )
    layout = PageLayout(block_size, keys, values)
    slots = torch.tensor([5, 0, -1, 11, 3, 2, 8])
    wanted = pages.clone()
    copies = [copy.as_strided((num_blocks, 400), (far["block"], 1)) for copy in wanted]
    ref.load_rows(entry, copies, slots, None, True, None, block_size, layout.numbers, None)
    implementation.load_rows(entry, caches, slots, layout)
    assert torch.equal(as_bits(pages), as_bits(wanted))
    assert bool(gpu.used_vectors) == (odd is None)
    before = memory.clone()
    implementation.save_rows(entry, caches, slots, layout)
    assert torch.equal(as_bits(memory), as_bits(before))


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("rotary_dim", [128, 96, 64, 32, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_keys_turn_16_bytes_at_a_time(
    implementation: Implementation, gpu: Device, dtype: torch.dtype, rotary_dim: int, is_neox: bool
) -> None:
    """The dimensions past the rotary ones are copied by the same threads."""
    entry = random_values(Sizes(dim=128).entry_shape, dtype)
    turns = test_rows_turned.turns_of(test_rows_turned.some_angles(rotary_dim), torch.device("cpu"))
    found = test_rows_turned.load_and_look(implementation, entry, turns, is_neox)
    assert gpu.used_vectors
    wanted = test_rows_turned.turned_in_torch(entry[:, 0], turns, is_neox)
    # The same fp32 products and sums, but the compiler may fuse them: one unit in the last place after rounding.
    last_place = 2 * test_rows_turned.rounding(wanted.double().abs() * (1 + 1e-6), dtype)
    assert ((found[:, 0].double() - wanted.double()).abs() <= last_place).all()
    assert torch.equal(as_bits(found[:, 0, ..., rotary_dim:]), as_bits(entry[:, 0, ..., rotary_dim:]))
    assert torch.equal(as_bits(found[:, 1]), as_bits(entry[:, 1]))


def test_slots_outside_of_the_pages_are_passed_over(implementation: Implementation) -> None:
    for sizes in (Sizes(), Sizes(dim=64)):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            pages = paged("engine", sizes, dtype, torch.device("cpu"))
            before = pages.copy_of_memory()
            outside = [-2, sizes.num_blocks * sizes.block_size, 2**31, 2**40, -(2**62)]
            slots = torch.tensor((outside * sizes.tokens)[: sizes.tokens])
            entry = random_bits(sizes.entry_shape, dtype)
            bits = as_bits(entry).clone()
            implementation.load_rows(entry, pages.caches, slots, pages.layout)
            implementation.save_rows(entry, pages.caches, slots, pages.layout)
            test_rows.assert_memory_is(pages, before)
            assert torch.equal(as_bits(entry), bits)


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("sizes", [(40, 3, 128, 128), (19, 1, 72, 48), (7, 5, 8, 0), (33, 2, 96, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_are_shifted_16_bytes_at_a_time(
    implementation: Implementation, gpu: Device, dtype: torch.dtype, sizes: tuple[int, int, int, int], is_neox: bool
) -> None:
    for turns_keys in (True, False):
        given = test_shift.problem(sizes, dtype, is_neox=is_neox, turns_keys=turns_keys)
        for gpu.seed in range(3):
            test_shift.check(implementation, given)
        assert gpu.used_vectors
        entry = given.entry.clone()
        given.solve(implementation, entry, out=entry)
        assert torch.equal(as_bits(entry), as_bits(given.solve(implementation)))


def test_changes_out_of_a_matrix_product_and_expanded_ones_are_read_16_bytes_at_a_time(
    implementation: Implementation, gpu: Device
) -> None:
    given = test_shift.problem((40, 3, 128, 128), torch.bfloat16, is_neox=True)
    products = given.shift.transpose(0, 1).contiguous()
    for changes in (products.transpose(0, 1), given.shift[:, :1].expand_as(given.shift)):
        gpu.used_vectors = 0
        test_shift.check(implementation, dataclasses.replace(given, shift=changes))
        assert gpu.used_vectors


SHIFT_STRIDES = [f"{rows} {step}" for rows in ("entry", "shift", "out") for step in ("kv", "token", "head", "address")]
SHIFT_STRIDES += ["places address", "turns address"]


@pytest.mark.parametrize("odd", [None, *SHIFT_STRIDES])
def test_every_stride_and_address_must_allow_shifting_16_bytes_at_a_time(
    implementation: Implementation, gpu: Device, odd: str | None
) -> None:
    """As above; tables have no strides."""
    given = test_shift.problem((7, 2, 64, 64), torch.bfloat16, is_neox=True)
    assert given.turns is not None

    def placed(name: str, values: torch.Tensor) -> torch.Tensor:
        """The same values among gaps, at an address of which one may be odd."""
        steps = {"kv": 1600, "token": 200, "head": 80, "address": 0}
        steps = {step: size + (odd == f"{name} {step}") for step, size in steps.items()}
        memory = random_bits((4000,), values.dtype)
        strides = (steps["kv"], steps["token"], steps["head"], 1) if values.dim() == 4 else values.stride()
        view = memory.as_strided(values.shape, strides, steps["address"])
        return view.copy_(values)

    tables = {name: placed(name, getattr(given, name)) for name in ("shift", "places", "turns")}
    wanted, out = given.solve(implementation), placed("out", torch.zeros_like(given.entry))
    moved = test_shift.Problem(given.entry, tables["shift"], tables["places"], tables["turns"], given.is_neox)
    moved.solve(implementation, placed("entry", given.entry), out=out)
    assert bool(gpu.used_vectors) == (odd is None)
    assert torch.equal(out.float(), wanted.float())


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((9, 3, 20, 20), torch.bfloat16),
        ((9, 3, 64, 24), torch.bfloat16),
        ((9, 3, 33, 32), torch.float32),
        ((9, 3, 64, 64), torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_other_rows_are_shifted_one_element_at_a_time(
    implementation: Implementation, gpu: Device, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    gpu.used_vectors = 1
    for gpu.seed in range(3):
        given = test_shift.problem(sizes, dtype, is_neox=True)
        test_shift.check(implementation, given)
        entry = given.entry.clone()
        given.solve(implementation, entry, out=entry)
        assert torch.equal(as_bits(entry), as_bits(given.solve(implementation)))
    assert not gpu.used_vectors


CROWDED = Case((*scattered([150, 40, 210], 11), *run(1, 20, 60)), torch.bfloat16, heads=2, group=3, dim=64)


@pytest.mark.parametrize("multiprocessors", [1, 64], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_order_in_which_threads_run_changes_nothing(
    implementation: Implementation, gpu: Device, dtype: torch.dtype, multiprocessors: int
) -> None:
    gpu.multiprocessors = multiprocessors
    problem = build(
        dataclasses.replace(CROWDED, queries=(*CROWDED.queries, (0, 1100)), dtype=dtype), torch.device("cpu")
    )
    found = []
    for gpu.seed in range(4):
        found.append(problem.attend(implementation.sparse_query_attention))
    assert (gpu.splits > 1) == (multiprocessors == 64)
    assert gpu.used_vectors
    test_attention.assert_exact_enough(implementation, problem, found[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("multiprocessors", "kib", "rows"), [(1, 227, 128), (1, 99, 64), (4, 227, 64), (4, 80, 32), (4, 73, 16)]
)
def test_tiles_have_as_many_rows_as_the_device_has_room_for(
    implementation: Implementation, gpu: Device, multiprocessors: int, kib: int, rows: int
) -> None:
    gpu.multiprocessors, gpu.max_shared_nbytes = multiprocessors, kib << 10
    test_attention.check(implementation, dataclasses.replace(CROWDED, dim=80))
    assert gpu.rows == rows


@pytest.mark.parametrize("multiprocessors", [2, 400])
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, torch.float32, torch.float8_e5m2], ids=str)
def test_blocks_may_share_the_keys_of_a_tile(
    implementation: Implementation, gpu: Device, page_dtype: torch.dtype, multiprocessors: int
) -> None:
    """Some of them have no keys of some rows, and no keys at all of the short request."""
    gpu.multiprocessors = multiprocessors
    scales = (0.37, 2.9) if page_dtype.itemsize == 1 else None
    queries = (*scattered([2100], 5), (1, 3), (0, 0))
    test_attention.check(
        implementation, Case(queries, torch.bfloat16, page_dtype, dim=40, window=1500, soft_cap=9.0, scales=scales)
    )
    assert gpu.splits == {2: 2, 400: 4}[multiprocessors]


@pytest.mark.parametrize("multiprocessors", [1, 64], ids=["whole", "split"])
def test_a_nan_spoils_no_other_rows_of_its_tile_or_part(
    implementation: Implementation, gpu: Device, multiprocessors: int
) -> None:
    gpu.multiprocessors = multiprocessors
    clean = Case(tuple((r, p) for r in (0, 1) for p in (3, 40, 41, 600, 740, 900, 1100)), torch.bfloat16, window=300)
    case = dataclasses.replace(clean, nan_keys=(41,), nan_values=(700,))
    wanted, _ = exact(case)
    found = build(case, torch.device("cpu")).attend(implementation.sparse_query_attention)
    assert wanted.isnan().flatten(1).all(1).tolist() == [False, False, True, False, True, True, False] * 2
    assert torch.equal(found.isnan(), wanted.isnan())
    assert (found.double() - wanted).nan_to_num().abs().max() <= answer(clean)[1]
    assert (gpu.splits > 1) == (multiprocessors == 64)


def test_queries_that_cannot_be_answered_give_zeros_and_disturb_no_others(implementation: Implementation) -> None:
    """A GPU looks up numbers that nobody has checked: of requests, positions and blocks that do not exist."""
    case = Case(run(0, 10, 50), torch.bfloat16, dim=64)
    problem = build(case, torch.device("cpu"))
    wanted = problem.attend(implementation.sparse_query_attention)
    request, position = problem.arguments["request"].clone(), problem.arguments["position"].clone()
    request[3], request[4], request[5] = -1, 1, 2**31 - 1
    position[6], position[7] = -1, -(2**31)
    found = problem.attend(implementation.sparse_query_attention, request=request, position=position)
    assert (found[3:8] == 0).all()
    assert torch.equal(found[:3], wanted[:3])
    assert torch.equal(found[8:], wanted[8:])
    position[9] = 2**31 - 1  # sees all that the block table has room for
    nowhere = torch.full_like(problem.arguments["block_table"], 10**6)
    found = problem.attend(implementation.sparse_query_attention, position=position, block_table=nowhere)
    assert (found == 0).all()


def test_rows_of_a_multiple_of_16_bytes_reach_attention_16_bytes_at_a_time(
    implementation: Implementation, gpu: Device
) -> None:
    for dim, form in ((64, "engine"), (40, "kv_then_tokens"), (33, "engine"), (64, "packed"), (64, "keys_transposed")):
        test_attention.check(implementation, Case(scattered([70], 9), torch.bfloat16, form=form, dim=dim))
        assert gpu.used_vectors == (dim % 8 == 0 and form in ("engine", "kv_then_tokens"))


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="it would start itself")
def test_sanitizers_find_nothing_in_the_kernels() -> None:
    """Reads and writes outside of tensors and of shared memory, and undefined arithmetic."""
    names = ("libasan.so", "libstdc++.so.6")
    found = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    preload = " ".join(answer.stdout.strip() for answer in found)
    environment = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "CXXFLAGS": SANITIZERS}
    wanted = "16_bytes or one_element_at_a_time or slots_outside or share_the_keys or cannot_be_answered"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, __file__]
    answered = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)
    assert answered.returncode == 0, answered.stdout[-4000:] + answered.stderr[-4000:]
