"""Passes that go on with fewer tokens of a span than before: against a dense forward, and what chooses the tokens."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from exec.test_pages import BLOCK_SIZE, halves
from exec.test_recompute import (
    LEVELS,
    NUM_LAYERS,
    WIDTH,
    Decoder,
    PagedStack,
    Request,
    assert_equal_within_rounding,
    dense_forward,
)
from exec.test_shift import TellingStack, pages_of
from vlcache_connector.exec.batch import Row, VirtualBatch, build_batch
from vlcache_connector.exec.narrow import Narrowed, kept_at
from vlcache_connector.exec.recompute import Recompute
from vlcache_connector.exec.rope import Rope
from vlcache_connector.exec.sequence import EncoderOutput, SequenceInput
from vlcache_connector.exec.stored import StoredSpan
from vlcache_connector.types import Narrowing, Run

CPU = torch.device("cpu")
OFFSET, LENGTH, NUM_TOKENS = 3, 12, 19
SPAN = Run(OFFSET, OFFSET + LENGTH)
TEXT = [Run(0, OFFSET), Run(SPAN.end, NUM_TOKENS)]
HEADS = TellingStack.heads


def singles(tokens: Sequence[int]) -> tuple[Run, ...]:
    """Tokens of the span as runs of positions."""
    return tuple(Run(OFFSET + token, OFFSET + token + 1) for token in sorted(tokens))


def request_of(seed: int, block_ids: list[int]) -> Request:
    generator = torch.Generator().manual_seed(seed)
    return Request(
        torch.randint(0, 32, (NUM_TOKENS,), generator=generator),
        torch.randint(0, 50, (3, NUM_TOKENS), generator=generator),
        block_ids,
        [EncoderOutput([Run(OFFSET, OFFSET + LENGTH)], torch.randn(LENGTH, WIDTH * (1 + LEVELS), generator=generator))],
    )


def stored_kv(seed: int) -> torch.Tensor:
    return torch.randn(NUM_LAYERS, 2, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def narrowed_input(request: Request, sets: Sequence[Sequence[int]]) -> SequenceInput:
    """A pass that recomputes `sets[layer]` of the span's tokens in each layer, and all text."""
    runs = sorted((*TEXT, *singles(sets[0])), key=lambda run: run.start)
    narrowings = [
        Narrowing(layer, len(here), singles(here))
        for layer, (before, here) in enumerate(itertools.pairwise(sets), 1)
        if set(here) != set(before)
    ]
    narrowed = [Narrowed(SPAN, narrowings, len(sets[0]))] if narrowings else []
    return replace(request.input(runs), whole=(SPAN,), narrowed=narrowed)


def nested_sets(rng: random.Random) -> list[list[int]]:
    sets = [rng.sample(range(LENGTH), rng.randint(1, LENGTH))]
    for _ in range(NUM_LAYERS - 1):
        sets.append(rng.sample(sets[-1], rng.choice([len(sets[-1]), rng.randint(0, len(sets[-1]))])))
    return sets


# -- sets that the plan names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [3, 8, 1000])
@pytest.mark.parametrize("seed", range(12))
def test_each_layer_recomputes_its_own_tokens_and_sees_stored_ones_elsewhere(seed: int, max_tokens: int) -> None:
    rng = random.Random(seed)
    requests = [request_of(seed, [5, 2, 9, 0, 7]), request_of(seed + 100, [1, 3, 8, 4, 6])]
    sets = [nested_sets(rng) for _ in requests]
    stack = PagedStack(Decoder(torch.float64))
    for number, request in enumerate(requests):
        stack.pages[:, :, request.slots] = stored_kv(number)
    stack.recompute([narrowed_input(*pair) for pair in zip(requests, sets, strict=True)], max_tokens)
    for number, (request, chosen) in enumerate(zip(requests, sets, strict=True)):
        is_reused = torch.zeros(NUM_LAYERS, NUM_TOKENS, dtype=torch.bool)
        is_reused[:, SPAN.start : SPAN.end] = True
        for layer, tokens in enumerate(chosen):
            is_reused[layer, [OFFSET + token for token in tokens]] = False
        assert_equal_within_rounding(stack.kv(request), request, is_reused, stored_kv(number))


def test_tokens_that_are_left_out_cost_nothing_from_there_on() -> None:
    request, stack = request_of(1, list(range(5))), PagedStack(Decoder(torch.float64))
    stack.pages.zero_()
    stack.recompute([narrowed_input(request, [[1, 2, 3, 8], [2, 3], []])])
    num_text = sum(map(len, TEXT))
    assert [batch.num_tokens for batch in stack.batches] == [num_text + 4, num_text + 2, num_text]


def test_a_pass_that_runs_out_of_tokens_stops_computing() -> None:
    request, stack = request_of(1, list(range(5))), PagedStack(Decoder(torch.float64))
    stack.pages.zero_()
    alone = replace(narrowed_input(request, [[1, 2], [], []]), runs=singles([1, 2]))
    assert stack.recompute([alone]) == 1
    assert [batch.num_tokens for batch in stack.batches] == [2]


def test_what_is_left_of_a_batch_is_the_batch_of_what_is_left() -> None:
    """Against a batch that is built of the remaining runs."""
    for seed in range(50):
        rng = random.Random(seed)
        blocks = [rng.sample(range(20), 8), rng.sample(range(20), 8)]
        starts = sorted(rng.sample(range(0, 30, 5), 4))
        rows = [Row(number, Run(start, start + rng.randint(1, 5))) for number in (0, 1) for start in starts]
        whole = build_batch(rows, blocks, BLOCK_SIZE, CPU)
        keep = torch.tensor([rng.random() < 0.6 for _ in range(whole.num_tokens)])
        keep[0] = True
        kept = list(itertools.compress(range(whole.num_tokens), keep.tolist()))
        left: list[Row] = []
        row_of = [i for i, row in enumerate(rows) for _ in range(len(row.run))]
        for index in kept:
            position, number = int(whole.positions[index]), int(whole.requests[index])
            follows = left and row_of[index] == row_of[index - 1] and index - 1 in kept
            if follows:
                left[-1] = Row(number, Run(left[-1].run.start, position + 1))
            else:
                left.append(Row(number, Run(position, position + 1)))
        expected, found = build_batch(left, blocks, BLOCK_SIZE, CPU), whole.narrowed(keep)
        assert found.rows == expected.rows
        for name in ("requests", "positions", "query_start_loc", "seq_lens", "block_table", "slots"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
            assert getattr(found, name).dtype == getattr(expected, name).dtype, name


# -- samples that become fewer ----------------------------------------------------------------------------------------


class Shifting:
    """A span whose reused tokens follow those of its samples that each layer still has."""

    def __init__(self, sets: Sequence[Sequence[int]]) -> None:
        self.request = request_of(3, list(range(5)))
        self.pages = pages_of(halves((BLOCK_SIZE, *HEADS)), 5, NUM_LAYERS)
        rope, shape = Rope(torch.ones(HEADS[1] // 2), True), (NUM_LAYERS, 2, LENGTH, *HEADS)
        entry = torch.randn(shape, generator=torch.Generator().manual_seed(9))
        self.span = StoredSpan(self.pages, rope, OFFSET, entry, 0, [SPAN])
        self.input = replace(narrowed_input(self.request, sets), shifted={SPAN: self.span})

    def run(self) -> torch.Tensor:
        """What the pages hold of the span: [layers, 2, tokens, heads, dim]; zero where nothing was loaded."""
        stack = TellingStack(Decoder(torch.float32))
        stack.pages.zero_()
        stack.recompute([self.input])
        assert self.span.error is None and self.span.layers_loaded == NUM_LAYERS
        slots = self.request.slots[SPAN.start : SPAN.end]
        return torch.stack([cache.transpose(0, 1).flatten(1, 2)[:, slots] for cache in self.pages.caches])


def test_each_layer_loads_what_it_does_not_recompute() -> None:
    sets = [[0, 3, 7, 9], [3, 9], [3]]
    loaded = Shifting(sets).run().abs().sum(dim=(1, 3, 4)) > 0
    for layer, tokens in enumerate(sets):
        assert loaded[layer].tolist() == [token not in tokens for token in range(LENGTH)]


def test_layers_with_the_same_samples_move_reused_tokens_alike() -> None:
    """As long as no layer has fewer, a pass that narrows later is the same pass."""
    short, long = Shifting([[0, 3, 7, 9], [0, 3, 7, 9], [3]]).run(), Shifting([[0, 3, 7, 9]] * 3).run()
    assert torch.equal(short[:2], long[:2]) and not torch.equal(short[2], long[2])


def test_without_samples_reused_tokens_are_what_is_stored() -> None:
    case = Shifting([[0, 3, 7, 9], [0, 3, 7, 9], []])
    found = case.run()
    assert torch.allclose(found[2, 1], case.span.entry[2, 1], rtol=1e-6)
    assert not torch.allclose(found[1, 1, [1, 2]], case.span.entry[1, 1, [1, 2]], rtol=1e-2)


def test_what_is_loaded_does_not_need_a_token_that_is_computed() -> None:
    case = Shifting([[0, 3], [], []])
    case.input = replace(case.input, runs=singles([0, 3]))
    found = case.run()
    assert torch.allclose(found[1:, 1], case.span.entry[1:, 1], rtol=1e-6)


# -- tokens that the pass chooses -------------------------------------------------------------------------------------


def measured(count: int, layer: int, stored: torch.Tensor, request: Request) -> tuple[SequenceInput, StoredSpan]:
    """A span that is computed whole up to `layer`, and goes on with `count` tokens; `stored` [layers, 2, n, width]."""
    rope = Rope(torch.zeros(HEADS[1] // 2), True)  # positions are the decoder's own business here
    entry = stored[:, :, SPAN.start : SPAN.end].float().unflatten(-1, HEADS)
    span = StoredSpan(pages_of(halves((BLOCK_SIZE, *HEADS)), 5, NUM_LAYERS), rope, OFFSET, entry, 0, [SPAN])
    narrowed = [Narrowed(SPAN, [Narrowing(layer, count)], LENGTH)]
    whole = replace(request.input([Run(0, NUM_TOKENS)]), whole=(SPAN,), narrowed=narrowed, compared={SPAN: span})
    return whole, span


def exact_kv(request: Request) -> torch.Tensor:
    stack = PagedStack(Decoder(torch.float64))
    stack.recompute([request.input([Run(0, NUM_TOKENS)])])
    return stack.kv(request)


def kept_tokens(batch: VirtualBatch, request: int = 0) -> set[int]:
    positions = batch.positions[batch.requests == request].tolist()
    return {position - OFFSET for position in positions if SPAN.start <= position < SPAN.end}


@pytest.mark.parametrize("layer", [1, 2])
def test_the_tokens_that_deviate_most_go_on(layer: int) -> None:
    request = request_of(4, list(range(5)))
    stored, far = exact_kv(request), [2, 5, 11]
    stored += 1e-3 * torch.randn(stored.shape, generator=torch.Generator().manual_seed(2)).double()
    stored[layer - 1, 1, [OFFSET + token for token in far]] += 1.0
    sequence, span = measured(3, layer, stored, request)
    stack = TellingStack(Decoder(torch.float64))
    stack.pages[:, :, request.slots] = stored
    stack.recompute([sequence])
    assert [len(kept_tokens(batch)) for batch in stack.batches] == [LENGTH, 3] and span.error is None
    assert kept_tokens(stack.batches[-1]) == set(far)
    is_reused = torch.zeros(NUM_LAYERS, NUM_TOKENS, dtype=torch.bool)
    is_reused[layer:, SPAN.start : SPAN.end] = True
    is_reused[layer:, [OFFSET + token for token in far]] = False
    assert_equal_within_rounding(stack.kv(request), request, is_reused, stored)


def test_all_ranks_go_by_the_sum_of_what_they_see() -> None:
    """Two ranks, each with its own idea; what the sum says is what both do. One of them could not load the span."""
    requests = [request_of(4, list(range(5)))] * 2
    stored, batches = exact_kv(requests[0]), []
    votes: list[torch.Tensor] = []
    for rank in range(2):
        mine = stored.clone()
        mine[0, 1, OFFSET + (4 if rank == 0 else 6)] += 1.0 + rank
        sequence, _ = measured(1, 1, mine, requests[rank])
        if rank == 1:
            sequence = replace(sequence, compared={})
        stack = TellingStack(Decoder(torch.float64))
        stack.pages.zero_()

        def total(rows: torch.Tensor) -> torch.Tensor:
            votes.append(rows)
            return torch.stack(votes).sum(0)

        Recompute(stack, stack.attention, BLOCK_SIZE, stack.passes()._limits, CPU, total).run([sequence])
        batches.append(stack.batches[-1])
    assert len(votes) == 2 and float(votes[1].abs().max()) == 0.0
    assert kept_tokens(batches[0]) == kept_tokens(batches[1]) == {4}


def test_an_error_while_comparing_ends_the_span_and_not_the_pass() -> None:
    request = request_of(4, list(range(5)))
    sequence, span = measured(3, 1, exact_kv(request), request)
    span.entry = span.entry[:, :, :5]
    stack = TellingStack(Decoder(torch.float64))
    stack.pages.zero_()
    assert stack.recompute([sequence]) == 1
    assert isinstance(span.error, IndexError) and len(kept_tokens(stack.batches[-1])) == 3


def test_spans_of_a_request_share_what_goes_on() -> None:
    """Three tokens of each of two spans are six of both: all may be of one."""
    rows = [Row(0, Run(0, 10), whole=0), Row(0, Run(12, 22), whole=1), Row(1, Run(0, 10), whole=0)]
    batch = build_batch(rows, [list(range(10)), list(range(10, 20))], BLOCK_SIZE, CPU)
    spans = [Narrowed(Run(0, 10), [Narrowing(1, 3)], 10), Narrowed(Run(12, 22), [Narrowing(1, 3)], 10)]
    narrowed = {0: spans, 1: spans[:1]}
    keep = kept_at(1, batch, narrowed, lambda request, run: lambda at: at.float(), lambda rows: rows, 100)
    left = batch.narrowed(keep)
    assert left.positions.tolist() == [16, 17, 18, 19, 20, 21, 7, 8, 9] and left.requests.tolist() == [0] * 6 + [1] * 3


def test_neighbours_go_on_together_where_single_tokens_would_be_too_many_runs() -> None:
    rows = [Row(0, Run(0, 30), whole=0)]
    batch = build_batch(rows, [list(range(10))], BLOCK_SIZE, CPU)
    rng = random.Random(1)
    scores = torch.tensor([rng.random() for _ in range(30)])
    for count, most_runs in itertools.product([1, 5, 8, 29], [1, 3, 5, 100]):
        span, max_rows = Narrowed(Run(0, 30), [Narrowing(1, count)], 30), most_runs + len(batch.rows)
        keep = kept_at(1, batch, {0: [span]}, lambda request, run: lambda at: scores[at], lambda rows: rows, max_rows)
        left = batch.narrowed(keep)
        size = -(-count // most_runs)
        assert len(left.rows) <= most_runs and count <= left.num_tokens <= count + 2 * (size - 1)
        if size == 1:
            assert set(left.positions.tolist()) == set(scores.topk(count).indices.tolist())


def test_a_span_that_no_pass_can_hold_gets_its_share_in_each() -> None:
    request = request_of(4, list(range(5)))
    stored = exact_kv(request)
    sequence, _ = measured(6, 1, stored, request)
    stack = TellingStack(Decoder(torch.float64))
    stack.pages.zero_()
    stack.recompute([sequence], max_tokens=6)
    kept = [len(kept_tokens(after)) for before, after in itertools.pairwise(stack.batches) if kept_tokens(before)]
    assert sum(kept[::2]) == 6 and max(kept[::2]) == 3


# -- what a question looks at -----------------------------------------------------------------------------------------


@dataclass
class Listening(TellingStack):
    """Keeps the queries of the first pass, by layer."""

    seen: dict[int, torch.Tensor] = field(default_factory=dict)

    def run_layer(
        self, layer: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = hidden if residual is None else hidden + residual
        self.seen.setdefault(layer, self.decoder.project(layer, x, positions)[0])
        return super().run_layer(layer, positions, hidden, residual)


def test_a_question_chooses_the_tokens_that_it_looks_at() -> None:
    """Attention of the question over the span's stored keys times the norm of the value, summed; by loops."""
    request, question = request_of(6, list(range(5))), Run(SPAN.end + 1, NUM_TOKENS)
    stored = stored_kv(8)
    sequence, span = measured(4, 0, stored, request)
    sequence = replace(sequence, runs=[Run(0, SPAN.end + 1)], question=question)
    stack = Listening(Decoder(torch.float64))
    stack.pages[:, :, request.slots] = stored
    assert stack.recompute([sequence]) == 2 and span.error is None
    first, second = stack.batches
    text = [*range(OFFSET), SPAN.end]
    assert first.positions.tolist() == [*text, *range(question.start, question.end)]
    scores = [0.0] * LENGTH
    for layer, heads in itertools.product(range(NUM_LAYERS), range(HEADS[0])):
        dims = slice(heads * HEADS[1], (heads + 1) * HEADS[1])
        keys, values = (stored[layer, kv, SPAN.start : SPAN.end, dims] for kv in (0, 1))
        for query in stack.seen[layer][len(text) :, dims]:
            attention = (keys @ query / HEADS[1] ** 0.5).softmax(0)
            for token in range(LENGTH):
                scores[token] += float(attention[token] * values[token].norm())
    best = sorted(range(LENGTH), key=lambda token: -scores[token])[:4]
    assert kept_tokens(second) == set(best)
    is_reused = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    is_reused[SPAN.start : SPAN.end] = True
    expected = dense_forward(Decoder(torch.float64), request, is_reused, stored)
    where = slice(question.start, question.end)
    assert torch.allclose(stack.kv(request)[:, :, where], expected[:, :, where]), "it sees text, reused tokens, itself"


def test_a_question_that_follows_nothing_leaves_the_first_pass_out() -> None:
    request = request_of(6, list(range(5)))
    stack = TellingStack(Decoder(torch.float64))
    stack.pages.zero_()
    assert stack.recompute([narrowed_input(request, [[1, 2]] * 3)]) == 1


def test_a_question_and_a_deviation_choose_side_by_side() -> None:
    """Two requests in one pass, each by its own measure, as when each is alone."""
    asked, compared = request_of(6, list(range(5))), request_of(7, list(range(5, 10)))
    stored = stored_kv(8)
    by_question = replace(measured(4, 0, stored, asked)[0], question=Run(SPAN.end + 1, NUM_TOKENS))
    by_deviation = measured(3, 1, stored, compared)[0]
    chosen = []
    for sequences in ([by_question, by_deviation], [by_question], [by_deviation]):
        stack = TellingStack(Decoder(torch.float64))
        for request in (asked, compared):
            stack.pages[:, :, request.slots] = stored
        stack.recompute(sequences)
        chosen.append([kept_tokens(stack.batches[-1], number) for number in range(len(sequences))])
    assert chosen[0] == [*chosen[1], *chosen[2]]


def test_where_nothing_is_known_of_them_the_first_tokens_go_on() -> None:
    request = request_of(4, list(range(5)))
    sequence = replace(measured(3, 1, exact_kv(request), request)[0], compared={})
    stack = TellingStack(Decoder(torch.float64))
    stack.pages.zero_()
    stack.recompute([sequence])
    assert kept_tokens(stack.batches[-1]) == {0, 1, 2}
