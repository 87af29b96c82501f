"""Reused tokens that follow the change of samples, over pages of this file.

That the arithmetic is right on real pages and models is for `e2e/test_pages.py`, against transformers. Here: what the
changes of samples do to the others, against least squares in double precision, and what errors do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from exec import paged_rows, ridge
from exec.test_pages import BLOCK_SIZE, DIM, HEADS, Layout, halves, transposed_keys
from exec.test_recompute import LEVELS, NUM_LAYERS, WIDTH, Decoder, PagedStack, Request
from vlcache_connector.exec import shift
from vlcache_connector.exec.batch import VirtualBatch
from vlcache_connector.exec.content import MAX_FITTED
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.exec.recompute import FreshKV, Queries
from vlcache_connector.exec.rope import Rope
from vlcache_connector.exec.sequence import EncoderOutput
from vlcache_connector.exec.shift import NBYTES_AT_ONCE, SpanShift
from vlcache_connector.exec.stored import StoredSpan
from vlcache_connector.types import Run

OFFSET, DELTA = 2, 5
CHANNELS = torch.tensor([0, 1, 2])
LAYERS, FEATURE_LAYER = 4, 1
EPS = torch.finfo(torch.float32).eps
every_layout = pytest.mark.parametrize("layout", [halves(), transposed_keys()], ids=["halves", "transposed keys"])
every_style = pytest.mark.parametrize("is_neox", [True, False], ids=["halves turn", "pairs turn"])


@pytest.fixture(autouse=True, params=[NBYTES_AT_ONCE, 5 * 2 * HEADS * DIM * 4], ids=["at once", "5 tokens at once"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a layer is moved at once or in parts makes no difference."""
    monkeypatch.setattr(shift, "NBYTES_AT_ONCE", request.param)


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def runs_of(tokens: Sequence[int]) -> list[Run]:
    """Tokens of a span as runs of positions, one each."""
    return [Run(OFFSET + token, OFFSET + token + 1) for token in tokens]


class Scene:
    """A span in pages, and what a pass made of its samples: the entry, turned to where it is now, plus changes.

    `samples`: tokens of the span, in order; `changes` [layers, 2, samples, heads, dim] of keys before they are turned,
    and of values. All other tokens are reused, but those in `left_out`.
    """

    def __init__(
        self,
        samples: Sequence[int],
        changes: torch.Tensor,
        layout: Layout | None = None,
        is_neox: bool = True,
        length: int = 12,
        plain: torch.Tensor | None = None,
        left_out: Sequence[int] = (),
    ) -> None:
        num_blocks = 2 * -(-(OFFSET + length) // BLOCK_SIZE)
        self.block_ids = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(4)).tolist()
        self.pages = pages_of(layout or halves(), num_blocks)
        self.rope = Rope(torch.tensor([1.0, 0.3, 0.05]), is_neox, CHANNELS)
        self.positions = torch.randint(0, 50, (3, OFFSET + length), generator=torch.Generator().manual_seed(3))
        self.plain = randn(LAYERS, 2, length, HEADS, DIM, seed=2) if plain is None else plain  # keys not turned yet
        self.entry = self.plain.clone()
        self.entry[:, 0] = self.turned(self.plain[:, 0], self.positions[:, OFFSET:] - DELTA)
        self.samples, self.changes = torch.tensor(samples), changes.expand(-1, -1, len(samples), -1, -1)
        self.others = [token for token in range(length) if token not in {*samples, *left_out}]
        self.span = StoredSpan(self.pages, self.rope, OFFSET, self.entry, DELTA, runs_of(self.others))

    def turned(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys [layers, tokens, heads, dim] by complex multiplication in double precision."""
        angle = positions[CHANNELS].T.double() * self.rope.inv_freq.double()
        pairs = keys.double().unflatten(-1, (2, 3) if self.rope.is_neox else (3, 2))
        axis = -2 if self.rope.is_neox else -1
        x, y = pairs.unbind(axis)
        z = torch.complex(x, y) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.stack((z.real, z.imag), dim=axis).flatten(-2).float()

    def run(self) -> torch.Tensor:
        """All layers of a pass; returns keys and values [layers, 2, tokens, heads, dim] of the reused tokens."""
        # Rows of somebody else's stand before, between and behind those of the samples.
        rows = 1 + 2 * torch.arange(len(self.samples))
        shift = SpanShift(self.span, self.positions, self.block_ids)
        shift.take(rows, OFFSET + self.samples)
        for layer in range(LAYERS):
            fresh = self.plain[layer][:, self.samples] + self.changes[layer]
            keys, values = torch.full((2, 2 * len(rows) + 1, HEADS, DIM), torch.nan)
            keys[rows] = self.turned(fresh[:1], self.positions[:, OFFSET + self.samples])[0]
            values[rows] = fresh[1]
            shift.apply(layer, keys, values)
        assert self.span.layers_loaded == LAYERS
        return torch.stack([self.read(layer) for layer in range(LAYERS)])

    def read(self, layer: int) -> torch.Tensor:
        everything = paged_rows.read(self.pages, self.block_ids, OFFSET, OFFSET + self.entry.shape[2], layer)
        return everything[:, self.others]

    def moved(self, shift: torch.Tensor) -> torch.Tensor:
        """What reused tokens must hold when tokens moved by `shift` [layers, 2, tokens or 1, heads, dim]."""
        rows = (self.plain + shift)[:, :, self.others].float()
        rows[:, 0] = self.turned(rows[:, 0], self.positions[:, [OFFSET + token for token in self.others]])
        return rows

    def fitted(self, used: slice = slice(None)) -> torch.Tensor:
        """What the changes of samples say of all tokens [layers, 2, tokens, heads, dim], by least squares."""
        features = self.plain[FEATURE_LAYER, 1].flatten(1)
        changes = self.changes[:, :, used].permute(2, 0, 1, 3, 4)
        return ridge.fitted(features, self.samples[used], changes).permute(1, 2, 0, 3, 4)


def pages_of(layout: Layout, num_blocks: int, num_layers: int = LAYERS) -> Pages:
    caches = [layout.allocate(num_blocks, torch.float32).zero_() for _ in range(num_layers)]
    return Pages([PagedLayer(str(i), cache, layout.update) for i, cache in enumerate(caches)], *layout.sizes)


def assert_close(found: torch.Tensor, expected: torch.Tensor, num_samples: int) -> None:
    """Each number comes out of three turns and a handful of sums, and of weights as exact as their system allows."""
    bound = (64 + ridge.condition(num_samples)) * EPS * expected.abs().max()
    assert (found - expected).abs().max() <= bound


# -- what reused tokens follow ----------------------------------------------------------------------------------------


@every_layout
@every_style
def test_each_token_follows_the_samples_as_least_squares_say(layout: Layout, is_neox: bool) -> None:
    scene = Scene([0, 1, 5, 9], randn(LAYERS, 2, 4, HEADS, DIM), layout, is_neox)
    assert_close(scene.run(), scene.moved(scene.fitted()), 4)


@every_layout
@every_style
@pytest.mark.parametrize("samples", [[3], [0, 11], [0, 1, 5, 9], [*range(11)]], ids=len)
def test_a_change_of_all_samples_moves_everything_by_it(layout: Layout, is_neox: bool, samples: list[int]) -> None:
    change = randn(LAYERS, 2, 1, HEADS, DIM)
    scene = Scene(samples, change, layout, is_neox)
    found, expected = scene.run(), scene.moved(change)
    # Here weights need not be exact, only their sum; no weight is larger than two.
    assert (found - expected).abs().max() <= (64 + 2 * len(samples)) * EPS * expected.abs().max()


def test_a_single_sample_is_believed_by_all() -> None:
    change = randn(LAYERS, 2, 1, HEADS, DIM)
    for sample in (0, 6, 11):
        scene = Scene([sample], change)
        assert_close(scene.run(), scene.moved(change), 1)


def two_kinds(kinds: torch.Tensor) -> torch.Tensor:
    """Keys and values of tokens [layers, 2, tokens, heads, dim] of two kinds, which only values tell apart."""
    plain = randn(LAYERS, 2, len(kinds), HEADS, DIM, seed=6)
    plain[:, 1] = randn(LAYERS, 2, HEADS, DIM, seed=7)[:, kinds]
    return plain


@pytest.mark.parametrize("samples", [[0, 1], [0, 1, 2, 3], [0, 1, 2, 4, 6, 8], [0, 3, 4, 6, 8, 10]], ids=str)
def test_two_kinds_of_tokens_follow_each_its_own(samples: list[int]) -> None:
    """The penalty leaves a hundredth of a sample's share of what the kinds differ by: n samples of two kinds lie on a
    line, the sum of squares along it is S and the penalty 0.01 S / n, so the fit is short by 1 - 1 / (1 + 0.01 / n).
    """
    kinds = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0])
    change = randn(LAYERS, 2, 2, HEADS, DIM)
    of_token = change[:, :, kinds]
    scene = Scene(samples, of_token[:, :, samples], plain=two_kinds(kinds))
    found, mean = scene.run(), of_token[:, :, samples].mean(2, keepdim=True)
    kept = 1 / (1 + ridge.PENALTY / len(samples))
    assert_close(found, scene.moved(mean + kept * (of_token - mean)), len(samples))
    apart = (change[:, :, 0] - change[:, :, 1]).abs().max()
    off = (found - scene.moved(of_token))[:, 1].abs().max()
    assert off <= ridge.PENALTY / len(samples) * apart + 64 * EPS * found.abs().max()


def test_contradicting_samples_of_one_kind_leave_the_other_kind_alone() -> None:
    kinds = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1])
    change = randn(LAYERS, 2, 1, HEADS, DIM)
    samples = [0, 1, 4, 5]
    changes = torch.cat((change, -change, torch.zeros_like(change), torch.zeros_like(change)), dim=2)
    scene = Scene(samples, changes, plain=two_kinds(kinds))
    assert_close(scene.run(), scene.moved(torch.zeros_like(change)), 4)


@pytest.mark.parametrize("num_samples", [2, 3, 7])
def test_samples_that_share_stored_values_are_heard_alike_by_all_tokens(num_samples: int) -> None:
    plain = randn(LAYERS, 2, 12, HEADS, DIM, seed=6)
    plain[:, 1, :num_samples] = plain[:, 1, :1].clone()
    scene = Scene(range(num_samples), randn(LAYERS, 2, num_samples, HEADS, DIM), plain=plain)
    assert_close(scene.run(), scene.moved(scene.changes.mean(2, keepdim=True)), num_samples)


def test_some_samples_that_share_stored_values_speak_with_one_voice() -> None:
    plain = randn(LAYERS, 2, 12, HEADS, DIM, seed=6)
    plain[:, 1, 4] = plain[:, 1, 0]
    changes = randn(LAYERS, 2, 5, HEADS, DIM)
    scene = Scene([0, 2, 4, 6, 8], changes, plain=plain)
    found = scene.run()
    assert_close(found, scene.moved(scene.fitted()), 5)
    exchanged = changes[:, :, [2, 1, 0, 3, 4]]
    assert_close(Scene([0, 2, 4, 6, 8], exchanged, plain=plain).run(), found, 5)


@pytest.mark.parametrize(
    ("num_samples", "step"),
    [(MAX_FITTED - 1, 1), (MAX_FITTED, 1), (MAX_FITTED + 1, 2), (2 * MAX_FITTED, 2), (2 * MAX_FITTED + 1, 3)],
)
def test_of_too_many_samples_every_second_or_third_is_heard(num_samples: int, step: int) -> None:
    length = num_samples + 40
    samples = sorted(torch.randperm(length, generator=torch.Generator().manual_seed(8))[:num_samples].tolist())
    scene = Scene(samples, randn(LAYERS, 2, num_samples, HEADS, DIM), length=length)
    used = slice(None, None, step)
    assert len(samples[used]) <= MAX_FITTED
    assert_close(scene.run(), scene.moved(scene.fitted(used)), len(samples[used]))


def test_a_span_that_did_not_move_follows_as_well() -> None:
    scene = Scene([0, 1, 5, 9], randn(LAYERS, 2, 4, HEADS, DIM))
    scene.span.delta = 0
    scene.entry[:, 0] = scene.turned(scene.plain[:, 0], scene.positions[:, OFFSET:])
    assert_close(scene.run(), scene.moved(scene.fitted()), 4)


def test_nothing_but_reused_tokens_is_written() -> None:
    scene = Scene([0, 1, 5, 9], torch.ones(LAYERS, 2, 1, HEADS, DIM), left_out=[3, 11])
    scene.run()
    written = torch.zeros(len(scene.block_ids), BLOCK_SIZE, dtype=torch.bool)
    for token in scene.others:
        block, offset = divmod(OFFSET + token, BLOCK_SIZE)
        written[scene.block_ids[block], offset] = True
    assert int(written.sum()) == 6
    for cache in scene.pages.caches:
        assert torch.equal(cache.abs().sum(dim=(1, 3, 4)) > 0, written)


# -- errors, in passes of a decoder -----------------------------------------------------------------------------------

LENGTH = 12
SAMPLES = [Run(2, 4), Run(7, 8), Run(11, 12)]
REUSED = [Run(4, 7), Run(8, 11), Run(12, 14)]


@dataclass
class TellingStack(PagedStack):
    """Shows fresh KV and queries before attention reads, as the engine's attention layers do; makes some values NaN."""

    heads: tuple[int, int] = (2, WIDTH // 2)
    damaged: int | None = None  # this row of each pass

    @contextmanager
    def attention(
        self,
        batch: VirtualBatch,
        fresh_kv: FreshKV | None = None,
        queries: Queries | None = None,
        kv_only: int | None = None,
    ) -> Iterator[None]:
        self._fresh_kv, self._queries = fresh_kv, queries
        with super().attention(batch, fresh_kv, queries, kv_only):
            yield

    def run_layer(
        self, layer: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = hidden if residual is None else hidden + residual
        queries, keys, values = self.decoder.project(layer, x, positions)
        if self.damaged is not None:
            values[self.damaged] = torch.nan
        if self._fresh_kv is not None:
            self._fresh_kv(layer, keys.unflatten(1, self.heads), values.unflatten(1, self.heads))
        if self._queries is not None:
            self._queries(layer, queries.unflatten(1, self.heads))
        return super().run_layer(layer, positions, hidden, residual)


def request_of(seed: int, block_ids: list[int]) -> Request:
    generator = torch.Generator().manual_seed(seed)
    return Request(
        torch.zeros(OFFSET + LENGTH, dtype=torch.int64),
        torch.randint(0, 50, (3, OFFSET + LENGTH), generator=generator),
        block_ids,
        [EncoderOutput([Run(OFFSET, OFFSET + LENGTH)], torch.randn(LENGTH, WIDTH * (1 + LEVELS), generator=generator))],
    )


class Two:
    """Two requests with a shifted span each, in one pass. What becomes of the first must not touch the second."""

    def __init__(self) -> None:
        self.heads, dim = TellingStack.heads
        self.pages = pages_of(halves((BLOCK_SIZE, self.heads, dim)), 8, NUM_LAYERS)
        self.requests = [request_of(0, [0, 1, 2, 3]), request_of(1, [4, 5, 6, 7])]
        rope, shape = Rope(torch.ones(dim // 2), True), (NUM_LAYERS, 2, LENGTH, self.heads, dim)
        self.spans = [StoredSpan(self.pages, rope, OFFSET, randn(*shape, seed=n), 0, REUSED) for n in range(2)]

    def run(self, damaged: int | None = None) -> list[torch.Tensor]:
        """What the pages hold of the reused tokens of each: [layers, 2, tokens, heads, dim]."""
        whole = Run(OFFSET, OFFSET + LENGTH)
        inputs = [
            replace(request.input([Run(0, 4), *SAMPLES[1:]]), whole=(whole,), shifted={whole: span})
            for request, span in zip(self.requests, self.spans, strict=True)
        ]
        stack = TellingStack(Decoder(torch.float32), damaged=damaged)
        stack.pages.zero_()  # of reused tokens it holds something, which is enough here
        assert stack.recompute(inputs) == 1
        assert all(stack.pages[:, :, request.slots].isfinite().all() for request in self.requests[1:])
        return [self.read(request) for request in self.requests]

    def read(self, request: Request) -> torch.Tensor:
        layers = [
            torch.cat([paged_rows.read(self.pages, request.block_ids, r.start, r.end, layer) for r in REUSED], dim=1)
            for layer in range(NUM_LAYERS)
        ]
        return torch.stack(layers)


def test_spans_of_one_pass_are_loaded_each_from_its_own_entry() -> None:
    two = Two()
    both = two.run()
    assert all(span.error is None and span.layers_loaded == NUM_LAYERS for span in two.spans)
    assert all(bool(rows.isfinite().all()) for rows in both) and not torch.equal(*both)


ALL = slice(None)
SAMPLE = 7 - OFFSET
# what is damaged -> where in the entry, and what of the reused tokens that must reach
DAMAGE: dict[str, tuple[tuple[slice | int, slice | int, slice | int], slice | int]] = {
    "values of a sample": ((ALL, 1, SAMPLE), ALL),
    "values of a sample in one layer": ((1, 1, SAMPLE), ALL),
    "keys of a sample": ((ALL, 0, SAMPLE), 0),
    "everything": ((ALL, ALL, ALL), ALL),
}


@pytest.mark.parametrize(("where", "reached"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_damaged_sample_shows_as_an_error_or_in_all_reused_tokens_and_only_in_its_span(
    where: tuple[slice | int, slice | int, slice | int], reached: slice | int, value: float
) -> None:
    sound, two = Two().run(), Two()
    two.spans[0].entry[where] = value
    found = two.run()
    is_damaged = ~found[0].isfinite().flatten(-2).all(-1)  # [layers, 2, tokens]
    assert two.spans[0].error is not None or bool(is_damaged[:, reached].all())
    assert two.spans[1].error is None and torch.equal(found[1], sound[1])


@pytest.mark.parametrize("kv", [0, 1], ids=["keys", "values"])
def test_a_damaged_reused_token_damages_nothing_else(kv: int) -> None:
    sound, two = Two().run(), Two()
    two.spans[0].entry[:, kv, 6 - OFFSET] = torch.nan
    found = two.run()
    is_other = torch.tensor([position != 6 for run in REUSED for position in range(run.start, run.end)])
    assert two.spans[0].error is None and torch.equal(found[0][:, :, is_other], sound[0][:, :, is_other])
    assert bool(found[0][:, kv, ~is_other].isnan().all()) and torch.equal(found[1], sound[1])


def test_nan_from_the_pass_reaches_the_reused_tokens_of_its_span_only() -> None:
    sound, two = Two().run(), Two()
    found = two.run(damaged=2)  # the first sample of the first request
    assert two.spans[0].error is None and bool(found[0][:, 1].isnan().all())
    assert two.spans[1].error is None and torch.equal(found[1], sound[1])


@pytest.mark.parametrize("num_layers", [0, 1, NUM_LAYERS - 1])
def test_an_entry_that_ends_too_early_is_an_error_of_its_span_and_the_pass_goes_on(num_layers: int) -> None:
    sound, two = Two().run(), Two()
    two.spans[0].entry = two.spans[0].entry[:num_layers]
    found = two.run()
    assert isinstance(two.spans[0].error, IndexError) and two.spans[0].layers_loaded == num_layers
    assert two.spans[1].error is None and torch.equal(found[1], sound[1])


def test_reused_tokens_that_no_layer_loaded_are_an_error() -> None:
    """An attention that does not call back between KV update and attention: the pages would hold something else."""
    request = request_of(4, [0, 1, 2, 3])
    entry, whole = torch.zeros(NUM_LAYERS, 2, LENGTH, HEADS, DIM), Run(OFFSET, OFFSET + LENGTH)
    span = StoredSpan(pages_of(halves(), 9), Rope(torch.ones(3), True), OFFSET, entry, 0, REUSED)
    sequence = replace(request.input([Run(0, 4), *SAMPLES[1:]]), whole=(whole,), shifted={whole: span})
    PagedStack(Decoder(torch.float64)).recompute([sequence])
    assert "reused tokens are missing" in str(span.error)
