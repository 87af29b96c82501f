"""Virtual sequences: cutting into passes, the tensors of a pass, and the property that all of it rests on."""

import random
from dataclasses import dataclass

import pytest
import torch

from vlcache_connector.exec.batch import PassLimits, Row, VirtualBatch, build_batch, positions_of, split_passes
from vlcache_connector.types import Run

CPU = torch.device("cpu")
BLOCK_SIZE = 4


def tokens_of(rows: tuple[Row, ...] | list[Row]) -> list[tuple[int, int]]:
    """(request, position) of every token, in order."""
    return [(row.request, position) for row in rows for position in range(row.run.start, row.run.end)]


def random_rows(rng: random.Random, num_requests: int = 3, most: int = 40) -> list[Row]:
    """Rows in the order of requests, runs of a request ascending and disjoint."""
    rows: list[Row] = []
    for request in range(num_requests):
        edges = sorted(rng.sample(range(most), 2 * rng.randrange(0, 6)))
        rows += [Row(request, Run(*pair)) for pair in zip(edges[::2], edges[1::2], strict=True)]
    return rows


# -- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 16, 64, 10**6])
def test_passes_hold_every_token_once_in_order_and_never_too_many(max_tokens: int) -> None:
    rng = random.Random(max_tokens)
    for _ in range(200):
        rows = random_rows(rng)
        passes = list(split_passes(rows, PassLimits(max_tokens, 10**6)))
        assert [token for part in passes for token in tokens_of(part)] == tokens_of(rows)
        assert all(0 < len(tokens_of(part)) <= max_tokens for part in passes)
        assert all(len(row.run) > 0 for part in passes for row in part)
        assert len(passes) == -(-len(tokens_of(rows)) // max_tokens), "a pass that is not the last has room left"


def test_tokens_are_scattered_in_short_runs_of_what_stays_together() -> None:
    """Other runs may have been cut by a step's budget: what they are must not depend on that."""
    rows = [Row(0, Run(0, 5)), Row(0, Run(5, 8), whole=0), Row(0, Run(10, 30), whole=0), Row(1, Run(3, 4), whole=2)]
    batch = build_batch(rows, [range(10), range(10, 20)], BLOCK_SIZE, CPU)
    assert batch.scattered.nonzero()[:, 0].tolist() == [5, 6, 7, 28]


def test_rows_are_kept_whole_where_they_fit() -> None:
    rows = [Row(0, Run(3, 8)), Row(0, Run(20, 21)), Row(1, Run(0, 10))]
    assert list(split_passes(rows, PassLimits(16, 8))) == [tuple(rows)]
    assert list(split_passes(rows, PassLimits(6, 8))) == [
        (Row(0, Run(3, 8)), Row(0, Run(20, 21))),
        (Row(1, Run(0, 6)),),
        (Row(1, Run(6, 10)),),
    ]


@pytest.mark.parametrize("limits", [PassLimits(16, 100), PassLimits(1000, 5), PassLimits(20, 6)])
def test_rows_that_belong_together_are_cut_by_nothing_but_themselves(limits: PassLimits) -> None:
    """Where such rows are cut, if at all, is the same whatever stands before them."""
    rng = random.Random(limits.max_tokens)
    for _ in range(200):
        edges = sorted(rng.sample(range(60), 2 * rng.randrange(1, 8)))
        whole = [Row(1, Run(*pair), whole=0) for pair in zip(edges[::2], edges[1::2], strict=True)]
        others = random_rows(rng, num_requests=1)
        alone = list(split_passes(whole, limits))
        found = [[row for row in part if row.whole is not None] for part in split_passes([*others, *whole], limits)]
        assert [tuple(part) for part in found if part] == alone
        assert all(len(tokens_of(part)) <= limits.max_tokens and len(part) <= limits.max_rows for part in alone)


def test_nothing_to_do_is_no_pass() -> None:
    assert list(split_passes([], PassLimits(8, 8))) == []
    assert list(split_passes([Row(0, Run(5, 5))], PassLimits(8, 8))) == []


# -- tensors ----------------------------------------------------------------------------------------------------------


def random_blocks(rng: random.Random, num_requests: int, most: int = 40) -> list[list[int]]:
    """Block ids of each request, all different; some requests have more blocks than their tokens need."""
    per_request = -(-most // BLOCK_SIZE)
    ids = rng.sample(range(4 * num_requests * per_request), num_requests * (per_request + 3))
    return [[ids.pop() for _ in range(per_request + rng.randrange(4))] for _ in range(num_requests)]


@pytest.mark.parametrize("seed", range(20))
def test_tensors_of_a_pass_are_what_a_loop_over_its_tokens_gives(seed: int) -> None:
    rng = random.Random(seed)
    rows = random_rows(rng) or [Row(1, Run(2, 9))]
    rng.shuffle(rows)
    blocks = random_blocks(rng, 3)
    batch = build_batch(rows, blocks, BLOCK_SIZE, CPU)

    width = max(len(ids) for ids in blocks)
    assert batch.rows == tuple(rows)
    assert [*zip(batch.requests.tolist(), batch.positions.tolist(), strict=True)] == tokens_of(rows)
    assert batch.slots.tolist() == [
        blocks[r][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for r, p in tokens_of(rows)
    ]
    assert batch.block_table.tolist() == [
        blocks[row.request] + [0] * (width - len(blocks[row.request])) for row in rows
    ]
    assert batch.seq_lens.tolist() == [row.run.end for row in rows]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + row.run.end - row.run.start)
    assert batch.query_start_loc.tolist() == starts
    assert batch.num_tokens == len(tokens_of(rows))
    assert batch.max_query_len == max(row.run.end - row.run.start for row in rows)
    assert batch.max_seq_len == max(row.run.end for row in rows)
    dtypes = (batch.slots.dtype, batch.block_table.dtype, batch.seq_lens.dtype, batch.query_start_loc.dtype)
    assert dtypes == (torch.int64, torch.int32, torch.int32, torch.int32)
    assert (batch.requests.dtype, batch.positions.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize("seed", range(20))
def test_positions_of_runs_are_what_a_loop_over_them_gives(seed: int) -> None:
    """In the order of the runs, empty ones among them."""
    rng = random.Random(seed)
    starts = [rng.randrange(100) for _ in range(rng.randrange(8))]
    runs = [Run(start, start + rng.choice([0, 0, 1, 2, 9])) for start in starts]
    found = positions_of(runs)
    assert found.tolist() == [position for run in runs for position in range(run.start, run.end)]
    assert found.dtype == torch.int64


@pytest.mark.parametrize("runs", [[], [Run(5, 5)], [Run(0, 0), Run(9, 9)]])
def test_no_runs_have_no_positions(runs: list[Run]) -> None:
    found = positions_of(runs)
    assert (found.shape, found.dtype) == ((0,), torch.int64)


def test_slots_of_large_caches_do_not_overflow() -> None:
    batch = build_batch([Row(0, Run(0, 2))], [[2**31 - 1]], 128, CPU)
    assert batch.slots.tolist() == [(2**31 - 1) * 128, (2**31 - 1) * 128 + 1]


# -- the property -----------------------------------------------------------------------------------------------------
#
# Attention here has no softmax: the output of a token is the sum of (q k) v over what it attends to, in 64-bit
# integers. Such sums do not depend on their order, so they compare exactly: a token more, less or other shows.


@dataclass(frozen=True)
class Sequence:
    """One request: its blocks, and the query, key and value of each of its tokens."""

    block_ids: list[int]
    q: torch.Tensor  # [tokens, dim] int64
    k: torch.Tensor
    v: torch.Tensor

    def __len__(self) -> int:
        return len(self.q)

    def dense(self) -> torch.Tensor:
        """Each token attends to itself and all before it."""
        return (self.q @ self.k.T).tril() @ self.v


def random_sequences(rng: random.Random, lengths: list[int], dim: int = 5) -> list[Sequence]:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    blocks = random_blocks(rng, len(lengths), max(lengths))
    tensors = [torch.randint(-1000, 1000, (3, n, dim), generator=generator) for n in lengths]
    return [Sequence(ids, *qkv) for ids, qkv in zip(blocks, tensors, strict=True)]


def paged_attention(batch: VirtualBatch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Varlen paged attention, causal and aligned to the end of each row, as attention backends define it."""
    out = torch.empty_like(q)
    starts = batch.query_start_loc.tolist()
    for row, (start, end, seq_len) in enumerate(zip(starts[:-1], starts[1:], batch.seq_lens.tolist(), strict=True)):
        positions = torch.arange(seq_len)
        slots = batch.block_table[row].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        scores = q[start:end] @ k[slots].T
        out[start:end] = scores.tril(seq_len - (end - start)) @ v[slots]
    return out


def run_passes(
    sequences: list[Sequence], passes: list[tuple[Row, ...]], pages: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """Write keys and values of each pass into `pages` [2, slots, dim], then attend. Output per (request, position)."""
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    for part in passes:
        batch = build_batch(part, [s.block_ids for s in sequences], BLOCK_SIZE, CPU)
        q, k, v = (
            torch.cat([getattr(sequences[row.request], name)[row.run.start : row.run.end] for row in part])
            for name in "qkv"
        )
        pages[0, batch.slots], pages[1, batch.slots] = k, v
        out = paged_attention(batch, q, *pages)
        outputs.update(zip(tokens_of(part), out, strict=True))
    return outputs


def empty_pages(sequences: list[Sequence]) -> torch.Tensor:
    num_blocks = 1 + max(max(s.block_ids) for s in sequences)
    dim = sequences[0].q.shape[1]
    return torch.full((2, num_blocks * BLOCK_SIZE, dim), 10**6 + 3)  # reading an unwritten slot shows


def all_rows(rng: random.Random, sequences: list[Sequence]) -> list[Row]:
    """All tokens of all sequences as runs of random lengths."""
    rows: list[Row] = []
    for request, sequence in enumerate(sequences):
        cuts = sorted(rng.sample(range(1, len(sequence)), min(len(sequence) - 1, rng.randrange(6))))
        rows += [Row(request, Run(a, b)) for a, b in zip([0, *cuts], [*cuts, len(sequence)], strict=True)]
    return rows


def assert_dense(sequences: list[Sequence], outputs: dict[tuple[int, int], torch.Tensor]) -> None:
    wanted = {(r, p): row for r, sequence in enumerate(sequences) for p, row in enumerate(sequence.dense())}
    assert outputs.keys() == wanted.keys()
    wrong = [token for token, row in outputs.items() if not torch.equal(row, wanted[token])]
    assert not wrong, "tokens (request, position) that did not attend to exactly their own prefix"


@pytest.mark.parametrize("seed", range(20))
def test_within_one_pass_each_token_attends_to_its_own_prefix_in_any_order_of_rows(seed: int) -> None:
    rng = random.Random(seed)
    sequences = random_sequences(rng, [rng.randrange(1, 40) for _ in range(3)])
    rows = all_rows(rng, sequences)
    rng.shuffle(rows)
    assert_dense(sequences, run_passes(sequences, [tuple(rows)], empty_pages(sequences)))


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 8, 13, 50])
def test_over_several_passes_each_token_attends_to_its_own_prefix(max_tokens: int) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        sequences = random_sequences(rng, [rng.randrange(1, 40) for _ in range(3)])
        passes = list(split_passes(all_rows(rng, sequences), PassLimits(max_tokens, 10**6)))
        assert_dense(sequences, run_passes(sequences, passes, empty_pages(sequences)))


@pytest.mark.parametrize("seed", range(20))
def test_recomputed_tokens_attend_to_the_kv_of_reused_ones_where_it_lies(seed: int) -> None:
    """Keys and values of the other tokens are in the pages already, and are not those that the rows would write."""
    rng = random.Random(seed)
    sequences = random_sequences(rng, [rng.randrange(1, 40) for _ in range(3)])
    rows = [row for row in all_rows(rng, sequences) if rng.random() < 0.5] or [Row(0, Run(0, 1))]
    is_recomputed = set(tokens_of(rows))
    pages, dense = empty_pages(sequences), []
    for request, own in enumerate(sequences):
        stored = random_sequences(rng, [len(own)])[0]
        keep = torch.tensor([(request, p) in is_recomputed for p in range(len(own))])[:, None]
        k, v = torch.where(keep, own.k, stored.k), torch.where(keep, own.v, stored.v)
        dense.append(Sequence(own.block_ids, own.q, k, v).dense())
        slots = [own.block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(len(own))]
        pages[0, slots], pages[1, slots] = stored.k, stored.v
    rng.shuffle(rows)
    outputs = run_passes(sequences, [tuple(rows)], pages)
    assert outputs.keys() == is_recomputed
    assert all(torch.equal(row, dense[request][position]) for (request, position), row in outputs.items())


def test_a_pass_that_runs_before_an_earlier_one_is_noticed() -> None:
    """The property needs earlier positions first; the tests above must be able to see it broken."""
    rng = random.Random(0)
    sequences = random_sequences(rng, [12])
    passes: list[tuple[Row, ...]] = [(Row(0, Run(6, 12)),), (Row(0, Run(0, 6)),)]
    with pytest.raises(AssertionError, match="own prefix"):
        assert_dense(sequences, run_passes(sequences, passes, empty_pages(sequences)))


def test_a_pass_has_no_more_rows_than_the_engine_batches() -> None:
    rows = [Row(i % 2, Run(10 * i, 10 * i + 2)) for i in range(7)]
    passes = list(split_passes(rows, PassLimits(100, 3)))
    assert [len(part) for part in passes] == [3, 3, 1]
    assert [row for part in passes for row in part] == rows
