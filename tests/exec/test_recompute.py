"""The recompute pass over a small decoder of this file, against a dense forward of the same decoder.

The decoder has what real ones have: several layers with a residual stream, rotary positions in three channels, softmax
attention over pages, an MLP, and encoder rows that enter before the first layer and are added after later ones.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import pytest
import torch

from vlcache_connector.exec.batch import PassLimits, VirtualBatch
from vlcache_connector.exec.model import Prompt, run_layers
from vlcache_connector.exec.recompute import FreshKV, Queries, Recompute
from vlcache_connector.exec.rope import Rope
from vlcache_connector.exec.sequence import EncoderOutput, SequenceInput
from vlcache_connector.types import Run

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS = 4, 64
NUM_LAYERS, WIDTH, VOCABULARY = 3, 16, 32
LEVELS = 2  # layers after which encoder rows are added


# -- a small decoder --------------------------------------------------------------------------------------------------


class Decoder:
    """Weights and arithmetic. Weights are fp32 numbers, so that the same decoder exists in fp32 and in fp64."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)

        def weight(*shape: int) -> torch.Tensor:
            values: torch.Tensor = torch.randn(*shape, generator=generator) / shape[-2] ** 0.5
            return values.to(dtype)

        self.dtype = dtype
        self.table = weight(VOCABULARY, WIDTH) * 4
        self.qkv = weight(NUM_LAYERS, WIDTH, 3 * WIDTH)
        self.out = weight(NUM_LAYERS, WIDTH, WIDTH)
        self.mlp = weight(NUM_LAYERS, WIDTH, WIDTH)
        self.frequencies = weight(3, WIDTH // 2)  # each pair of dimensions turns with all three channels

    def project(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value [n, width] of rows x [n, width] at positions [3, n]."""
        q, k, v = (x @ self.qkv[layer]).chunk(3, dim=-1)
        angle = positions.T.to(self.dtype) @ self.frequencies
        return self.turn(q, angle), self.turn(k, angle), v

    def turn(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal softmax attention, aligned to the end: the last query is the last key's."""
        future = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = (q @ k.T / WIDTH**0.5).masked_fill(future, -torch.inf)
        rows: torch.Tensor = scores.softmax(-1) @ v
        return rows


@dataclass
class Request:
    token_ids: torch.Tensor
    positions: torch.Tensor  # [3, tokens]
    block_ids: list[int]
    embeddings: list[EncoderOutput]  # rows of width * (1 + LEVELS)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def slots(self) -> list[int]:
        return [self.block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(len(self))]

    def input(self, runs: Sequence[Run]) -> SequenceInput:
        return SequenceInput(self.token_ids, self.positions, self.block_ids, runs, self.embeddings)


def dense_forward(
    decoder: Decoder, request: Request, reused: torch.Tensor | None = None, stored: torch.Tensor | None = None
) -> torch.Tensor:
    """Keys and values [layers, 2, tokens, width] of a whole request, computed at once.

    Where `reused` [tokens], or [layers, tokens], is true, attention sees `stored` [layers, 2, tokens, width] instead.
    """
    x = decoder.table[request.token_ids].clone()
    added = torch.zeros(LEVELS, len(request), WIDTH, dtype=decoder.dtype)
    for output in request.embeddings:
        pieces = output.rows.to(decoder.dtype).view(-1, 1 + LEVELS, WIDTH)
        tokens = [position for run in output.runs for position in range(run.start, run.end)]
        x[tokens] = pieces[:, 0]
        added[:, tokens] = pieces[:, 1:].transpose(0, 1)
    result = []
    for layer in range(NUM_LAYERS):
        q, k, v = decoder.project(layer, x, request.positions)
        if reused is not None and stored is not None:
            here = reused.expand(NUM_LAYERS, -1)[layer][:, None]
            k, v = torch.where(here, stored[layer, 0], k), torch.where(here, stored[layer, 1], v)
        x = x + decoder.attend(q, k, v) @ decoder.out[layer]
        x = x + torch.tanh(x @ decoder.mlp[layer])
        if layer < LEVELS:
            x = x + added[layer]
        result.append(torch.stack((k, v)))
    return torch.stack(result)


class KVWritten(Exception):  # noqa: N818, it is no error
    """Ends a layer of which only the KV is needed."""


@dataclass
class PagedStack:
    """A `LayerStack` and its `AttentionContext`: the decoder over pages that start out as NaN."""

    decoder: Decoder
    batches: list[VirtualBatch] = field(default_factory=list)
    attended: list[int] = field(default_factory=list)  # layers that ran to their end
    rope: Rope = field(default_factory=lambda: Rope(torch.zeros(WIDTH // 2), is_neox=True))
    num_layers: int = NUM_LAYERS

    def __post_init__(self) -> None:
        shape = (NUM_LAYERS, 2, NUM_BLOCKS * BLOCK_SIZE, WIDTH)
        self.pages = torch.full(shape, torch.nan, dtype=self.decoder.dtype)
        self._open: VirtualBatch | None = None
        self._kv_only: int | None = None

    @contextmanager
    def attention(
        self,
        batch: VirtualBatch,
        fresh_kv: FreshKV | None = None,
        queries: Queries | None = None,
        kv_only: int | None = None,
    ) -> Iterator[None]:
        self.batches.append(batch)
        self._open, self._kv_only = batch, kv_only
        with suppress(KVWritten):
            yield
        self._open = None

    def positions(self, prompt: Prompt) -> torch.Tensor:
        raise NotImplementedError  # positions are part of each test's requests

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.decoder.table[token_ids]

    def split_embedding(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        pieces: Sequence[torch.Tensor] = rows.split(WIDTH, dim=-1)
        return pieces

    def run_layer(
        self, layer: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self._open is not None, "attention outside of its context"
        x = hidden if residual is None else hidden + residual
        q, k, v = self.decoder.project(layer, x, positions)
        self.pages[layer, 0, self._open.slots], self.pages[layer, 1, self._open.slots] = k, v
        if layer == self._kv_only:
            raise KVWritten
        self.attended.append(layer)
        x = x + self.paged_attention(layer, q, self._open) @ self.decoder.out[layer]
        return torch.tanh(x @ self.decoder.mlp[layer]), x

    def run(self, positions: torch.Tensor, hidden: torch.Tensor, added: Sequence[torch.Tensor]) -> None:
        run_layers(self, range(self.num_layers), positions, hidden, None, added)

    def logits(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        assert self._open is None and residual is not None
        return (hidden + residual) @ self.decoder.table.T

    def paged_attention(self, layer: int, q: torch.Tensor, batch: VirtualBatch) -> torch.Tensor:
        starts, out = batch.query_start_loc.tolist(), torch.empty_like(q)
        for row, seq_len in enumerate(batch.seq_lens.tolist()):
            positions = torch.arange(seq_len)
            slots = batch.block_table[row].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            rows = slice(starts[row], starts[row + 1])
            out[rows] = self.decoder.attend(q[rows], *self.pages[layer][:, slots])
        return out

    def kv(self, request: Request) -> torch.Tensor:
        """What the pages hold of a request: [layers, 2, tokens, width]."""
        return self.pages[:, :, request.slots]

    def passes(self, max_tokens: int = 10**6) -> Recompute:
        return Recompute(self, self.attention, BLOCK_SIZE, PassLimits(max_tokens, 10**6), CPU)

    def recompute(self, inputs: Sequence[SequenceInput], max_tokens: int = 10**6) -> int:
        return self.passes(max_tokens).run(inputs)


# -- requests ---------------------------------------------------------------------------------------------------------


def random_requests(rng: random.Random, num_requests: int) -> list[Request]:
    """Requests with up to three spans, one of them at position 0, two of them adjacent, and text within one in some."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    requests = []
    for _ in range(num_requests):
        embeddings: list[EncoderOutput] = []
        end = 0
        for _ in range(rng.randrange(4)):
            offset, length = end + rng.choice([0, 0, 1, 4]), rng.choice([1, 3, 9])
            runs = [Run(offset, offset + length)]
            for _ in range(rng.choice([0, 0, 1, 3])):
                start = runs[-1].end + rng.choice([1, 2, 5])
                runs.append(Run(start, start + rng.choice([1, 4])))
            num_rows, end = sum(map(len, runs)), runs[-1].end
            rows = torch.randn(num_rows, WIDTH * (1 + LEVELS), generator=generator)
            embeddings.append(EncoderOutput(runs, rows))
        num_tokens = max(2, end + rng.choice([0, 1, 6]))
        requests.append(
            Request(
                torch.randint(VOCABULARY, (num_tokens,), generator=generator),
                torch.randint(100, (3, num_tokens), generator=generator),
                [free.pop() for _ in range(-(-num_tokens // BLOCK_SIZE) + rng.randrange(2))],
                embeddings,
            )
        )
    return requests


def random_runs(rng: random.Random, num_tokens: int) -> list[Run]:
    """All tokens as runs of random lengths, in order."""
    cuts = sorted(rng.sample(range(1, num_tokens), min(num_tokens - 1, rng.randrange(6))))
    return [Run(a, b) for a, b in zip([0, *cuts], [*cuts, num_tokens], strict=True)]


def assert_equal_within_rounding(
    found: torch.Tensor, request: Request, reused: torch.Tensor | None = None, stored: torch.Tensor | None = None
) -> None:
    """`found` is a run in fp64. Its distance from the dense forward in fp64 must be rounding.

    How much that may be is measured: rounding errors grow in proportion to the unit roundoff, so those of an fp64 run
    are those of an fp32 run (dense fp32 against dense fp64) times the ratio of the two. Two fp64 runs lie at most twice
    as far apart, and twice that is the house rule for the largest of many errors.
    """
    exact = dense_forward(Decoder(torch.float64), request, reused, stored)
    coarse = dense_forward(Decoder(torch.float32), request, reused, stored.float() if stored is not None else None)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    bound = 4 * ratio * (coarse.double() - exact).abs().max()
    error = (found - exact).abs().max()  # NaN, where a slot was read or left unwritten, is not below any bound
    assert error <= bound, f"off by {error:.1e}, more than {bound:.1e}"


# -- equality with a dense forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_all_runs_in_one_pass_in_any_order_equal_a_dense_forward(seed: int) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, 3)
    runs = [rng.sample(r, len(r)) for r in (random_runs(rng, len(request)) for request in requests)]
    stack = PagedStack(Decoder(torch.float64))
    inputs = [request.input(scattered) for request, scattered in zip(requests, runs, strict=True)]
    assert stack.recompute(inputs) == 1
    for request in requests:
        assert_equal_within_rounding(stack.kv(request), request)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 8, 21, 1000])
def test_passes_of_any_size_equal_a_dense_forward(max_tokens: int) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        requests = random_requests(rng, 3)
        stack = PagedStack(Decoder(torch.float64))
        passes = stack.recompute([request.input(random_runs(rng, len(request))) for request in requests], max_tokens)
        assert passes == len(stack.batches) == -(-sum(len(request) for request in requests) // max_tokens)
        assert all(batch.num_tokens <= max_tokens for batch in stack.batches)
        for request in requests:
            assert_equal_within_rounding(stack.kv(request), request)


@pytest.mark.parametrize("max_tokens", [3, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_recomputed_tokens_see_the_kv_of_reused_ones_and_leave_it_alone(seed: int, max_tokens: int) -> None:
    """Reused KV is arbitrary: it is what is in the pages that counts, not what the layers would compute."""
    rng = random.Random(seed)
    requests = random_requests(rng, 2)
    stack = PagedStack(Decoder(torch.float64))
    inputs, expected = [], []
    for request in requests:
        runs = random_runs(rng, len(request))
        kept = [run for run in runs if rng.random() < 0.5] or runs[-1:]
        reused = torch.ones(len(request), dtype=torch.bool)
        for run in kept:
            reused[run.start : run.end] = False
        generator = torch.Generator().manual_seed(seed)
        stored = torch.randn(NUM_LAYERS, 2, len(request), WIDTH, generator=generator).double()
        stack.pages[:, :, request.slots] = stored  # what is to be recomputed holds something wrong before
        inputs.append(request.input(kept))
        expected.append((reused, stored))
    before = stack.pages.clone()
    stack.recompute(inputs, max_tokens)
    for request, (reused, stored) in zip(requests, expected, strict=True):
        assert_equal_within_rounding(stack.kv(request), request, reused, stored)
    written = {
        slot
        for request, (reused, _) in zip(requests, expected, strict=True)
        for slot, is_reused in zip(request.slots, reused.tolist(), strict=True)
        if not is_reused
    }
    untouched = [slot for slot in range(NUM_BLOCKS * BLOCK_SIZE) if slot not in written]
    assert torch.equal(stack.pages[:, :, untouched].view(torch.int64), before[:, :, untouched].view(torch.int64))


@pytest.mark.parametrize("part", ["token_ids", "positions", "embeddings"])
def test_a_single_wrong_input_is_far_outside_the_bound(part: str) -> None:
    """What the tests above call rounding must not hide a wrong row."""
    rows = torch.randn(5, WIDTH * (1 + LEVELS), generator=torch.Generator().manual_seed(0))
    right, late = (EncoderOutput([Run(start, start + 5)], rows) for start in (6, 7))
    request = Request(torch.arange(14), torch.arange(14).expand(3, -1), [3, 9, 1, 7], [right])
    stack = PagedStack(Decoder(torch.float64))
    wrong = {
        "token_ids": replace(request, token_ids=request.token_ids.clone().index_fill(0, torch.tensor([2]), 31)),
        "positions": replace(request, positions=request.positions + torch.eye(3, 14, dtype=torch.int64)),
        "embeddings": replace(request, embeddings=[late]),
    }[part]
    stack.recompute([wrong.input([Run(0, 14)])])
    with pytest.raises(AssertionError, match="more than"):
        assert_equal_within_rounding(stack.kv(request), request)


def test_the_last_layer_runs_to_its_end_only_for_logits() -> None:
    (request,) = random_requests(random.Random(1), 1)
    everything = request.input([Run(0, len(request))])
    stack = PagedStack(Decoder(torch.float64))
    stack.recompute([everything])
    assert stack.attended == list(range(NUM_LAYERS - 1))
    stack.passes().last_logits(everything)
    assert stack.attended == [*range(NUM_LAYERS - 1), *range(NUM_LAYERS)]


@pytest.mark.parametrize("max_tokens", [1, 5, 1000])
def test_logits_are_those_of_the_last_token_of_the_last_pass(max_tokens: int) -> None:
    """All layers see the KV that a dense forward computes, so the last token's rows can be made from it alone."""
    decoder = Decoder(torch.float64)
    for seed in range(4):
        (request,) = random_requests(random.Random(seed), 1)
        stack = PagedStack(decoder)
        found = stack.passes(max_tokens).last_logits(request.input([Run(0, len(request))]))
        last, kv = Run(len(request) - 1, len(request)), dense_forward(decoder, request)
        alone = PagedStack(decoder)
        alone.pages[:, :, request.slots] = kv
        expected = alone.passes().last_logits(request.input([last]))
        assert found is not None and expected is not None and found.shape == (VOCABULARY,)
        torch.testing.assert_close(found, expected)
        assert len(stack.batches) == -(-len(request) // max_tokens)


# -- what enters where ------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """A `LayerStack` that computes nothing: layers hand on their rows and note what they were given."""

    num_layers: int = 3
    rope: Rope = field(default_factory=lambda: Rope(torch.zeros(1), is_neox=True))
    batches: list[VirtualBatch] = field(default_factory=list)
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (layer, positions, rows)

    @contextmanager
    def attention(
        self,
        batch: VirtualBatch,
        fresh_kv: FreshKV | None = None,
        queries: Queries | None = None,
        kv_only: int | None = None,
    ) -> Iterator[None]:
        self.batches.append(batch)
        yield

    def positions(self, prompt: Prompt) -> torch.Tensor:
        raise NotImplementedError

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return token_ids.float()[:, None] + torch.zeros(2)

    def split_embedding(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        pieces: Sequence[torch.Tensor] = rows.split(2, dim=-1)
        return pieces

    def run_layer(
        self, layer: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.calls.append((layer, positions, hidden.clone()))
        return hidden, residual

    def run(self, positions: torch.Tensor, hidden: torch.Tensor, added: Sequence[torch.Tensor]) -> None:
        run_layers(self, range(self.num_layers), positions, hidden, None, added)

    def logits(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor | None:
        return hidden[:, :1]

    def recompute(self, inputs: Sequence[SequenceInput], max_tokens: int = 10**6) -> int:
        return Recompute(self, self.attention, BLOCK_SIZE, PassLimits(max_tokens, 10**6), CPU).run(inputs)

    def rows(self, layer: int) -> list[float]:
        """First element of every row that a layer was given, over all passes."""
        return [row[0] for at, _, hidden in self.calls if at == layer for row in hidden.tolist()]


def levels_of(levels: int, *runs: Run) -> EncoderOutput:
    """Encoder rows that tell where they belong: 1000 + position, then 10^4 and 10^6 times that for each level."""
    numbers = 1000.0 + torch.cat([torch.arange(run.start, run.end) for run in runs])
    rows = torch.stack([numbers * scale for scale in (1, 1, 10**4, 10**4, 10**6, 10**6)], dim=1)
    return EncoderOutput(runs, rows[:, : 2 * levels + 2])


def sequence(num_tokens: int, runs: list[Run], embeddings: list[EncoderOutput]) -> SequenceInput:
    positions = torch.arange(num_tokens) + torch.tensor([[100], [200], [300]])
    return SequenceInput(torch.arange(num_tokens), positions, list(range(20)), runs, embeddings)


def test_encoder_rows_replace_the_rows_of_their_span_and_no_others() -> None:
    recorder = Recorder()
    runs = [Run(0, 2), Run(4, 6), Run(9, 12), Run(14, 16)]  # text, into a span, out of it, across two adjacent spans
    spans = [levels_of(0, Run(5, 11)), levels_of(0, Run(12, 15)), levels_of(0, Run(15, 16))]
    recorder.recompute([sequence(20, runs, spans)])
    assert recorder.rows(layer=0) == [0, 1, 4, 1005, 1009, 1010, 11, 1014, 1015]
    assert recorder.rows(layer=1) == recorder.rows(layer=2) == recorder.rows(layer=0)


def test_added_rows_enter_after_their_layer_and_are_zero_for_text() -> None:
    recorder = Recorder()
    recorder.recompute([sequence(10, [Run(2, 5), Run(6, 8)], [levels_of(2, Run(3, 7))])])
    before = [2, 1003, 1004, 1006, 7]
    after_layer_0 = [2, 1003 + 1003e4, 1004 + 1004e4, 1006 + 1006e4, 7]
    # fp32 holds each sum below exactly or rounds it as the additions of the pass do, one by one.
    after_layer_1 = (torch.tensor(after_layer_0) + torch.tensor([0, 1003e6, 1004e6, 1006e6, 0])).tolist()
    assert [recorder.rows(layer) for layer in range(3)] == [before, after_layer_0, after_layer_1]


def test_encoder_rows_of_frames_pass_over_the_text_between_them() -> None:
    recorder = Recorder()
    frames = levels_of(1, Run(3, 5), Run(7, 8), Run(10, 13))
    recorder.recompute([sequence(16, [Run(2, 6), Run(7, 9), Run(11, 15)], [frames])], max_tokens=5)
    assert recorder.rows(layer=0) == [2, 1003, 1004, 5, 1007, 8, 1011, 1012, 13, 14]
    added = [row * 1e4 if row > 1000 else 0 for row in recorder.rows(layer=0)]
    assert recorder.rows(layer=1) == [row + more for row, more in zip(recorder.rows(layer=0), added, strict=True)]


def test_a_pass_of_text_adds_nothing_although_others_do() -> None:
    recorder = Recorder()
    recorder.recompute([sequence(8, [Run(0, 8)], [levels_of(1, Run(4, 8))])], max_tokens=4)
    assert recorder.rows(layer=1)[:4] == [0, 1, 2, 3]
    assert recorder.rows(layer=1)[4:] == [n + n * 1e4 for n in (1004, 1005, 1006, 1007)]


def test_a_span_cut_by_passes_and_runs_still_gets_its_own_rows() -> None:
    recorder = Recorder()
    recorder.recompute([sequence(12, [Run(1, 5), Run(7, 12)], [levels_of(0, Run(2, 10))])], max_tokens=3)
    assert recorder.rows(layer=0) == [1, 1002, 1003, 1004, 1007, 1008, 1009, 10, 11]


def test_encoder_rows_of_another_dtype_are_converted() -> None:
    recorder = Recorder()
    output = levels_of(1, Run(0, 2))
    halved = replace(output, rows=output.rows.clamp(max=2048).half())
    recorder.recompute([sequence(3, [Run(0, 3)], [halved])])
    assert recorder.rows(layer=0) == [1000, 1001, 2]
    assert all(hidden.dtype == torch.float32 for _, _, hidden in recorder.calls)


def test_every_row_comes_with_the_positions_of_its_token() -> None:
    recorder = Recorder()
    recorder.recompute([sequence(9, [Run(1, 3), Run(6, 7)], []), sequence(4, [Run(3, 4)], [])])
    for _, positions, _ in recorder.calls:
        assert positions.tolist() == [[101, 102, 106, 103], [201, 202, 206, 203], [301, 302, 306, 303]]


def test_layers_run_in_order_once_per_pass() -> None:
    recorder = Recorder()
    assert recorder.recompute([sequence(8, [Run(0, 8)], [])], max_tokens=5) == 2
    assert [layer for layer, _, _ in recorder.calls] == [0, 1, 2, 0, 1, 2]


def test_several_requests_share_one_pass_and_keep_their_own_rows() -> None:
    recorder = Recorder()
    one, other = (
        sequence(6, [Run(0, 2), Run(4, 6)], [levels_of(0, Run(4, 6))]),
        sequence(5, [Run(3, 5)], [levels_of(0, Run(3, 4))]),
    )
    assert recorder.recompute([one, other]) == 1
    assert [row.request for row in recorder.batches[0].rows] == [0, 0, 1]
    assert recorder.rows(layer=0) == [0, 1, 1004, 1005, 1003, 4]


def test_a_pass_may_end_one_request_and_begin_another() -> None:
    recorder = Recorder()
    assert recorder.recompute([sequence(3, [Run(0, 3)], []), sequence(3, [Run(0, 3)], [])], max_tokens=2) == 3
    requests = [[row.request for row in batch.rows] for batch in recorder.batches]
    assert requests == [[0], [0, 1], [1]]


def test_nothing_to_recompute_is_no_pass() -> None:
    recorder = Recorder()
    assert recorder.recompute([]) == recorder.recompute([sequence(5, [], [])]) == 0
    assert not recorder.batches
    assert not recorder.calls
