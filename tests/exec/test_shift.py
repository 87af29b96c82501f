"""Reused tokens that move by the mean change of samples, over pages of this file.

That the arithmetic is right on real pages and models is for `e2e/test_pages.py`, against transformers. Here: what
samples that agree, disagree or stand alone do to the others.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from exec import paged_rows
from exec.test_pages import BLOCK_IDS, DIM, HEADS, NUM_BLOCKS, Layout, halves, transposed_keys
from exec.test_recompute import LEVELS, NUM_LAYERS, WIDTH, Decoder, PagedStack, Request
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.exec.rope import Rope
from vlcache_connector.exec.shift import ShiftedSpan, SpanShift
from vlcache_connector.types import Run

OFFSET, LENGTH, DELTA = 2, 12, 5
CHANNELS = torch.tensor([0, 1, 2])
SAMPLES = [Run(2, 4), Run(7, 8), Run(11, 12)]
REUSED = [Run(4, 7), Run(8, 11), Run(12, 14)]
LAYERS = 2
EPS = torch.finfo(torch.float32).eps
every_layout = pytest.mark.parametrize("layout", [halves(), transposed_keys()], ids=["halves", "transposed keys"])
every_style = pytest.mark.parametrize("is_neox", [True, False], ids=["halves turn", "pairs turn"])


class Scene:
    """A span in pages, and what a pass made of its samples: the entry, turned to where it is now, plus changes."""

    def __init__(self, pages: Pages, is_neox: bool, changes: torch.Tensor, samples: Sequence[Run] = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(3)
        self.pages = pages
        self.rope = Rope(torch.tensor([1.0, 0.3, 0.05]), is_neox, CHANNELS)
        self.positions = torch.randint(0, 50, (3, OFFSET + LENGTH), generator=generator)
        self.plain = torch.randn(LAYERS, 2, LENGTH, HEADS, DIM, generator=generator)  # keys before they are turned
        self.entry = self.plain.clone()
        self.entry[:, 0] = self.turned(self.plain[:, 0], self.positions[:, OFFSET:] - DELTA)
        self.samples, self.changes = samples, changes
        self.span = ShiftedSpan(pages, self.rope, OFFSET, self.entry, DELTA, REUSED)
        self.tokens = torch.cat([torch.arange(run.start, run.end) for run in samples]) - OFFSET

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
        rows, first = [], 1  # one row of somebody else's stands before them
        for run in self.samples:
            rows.append((first, run))
            first += len(run)
        shift = SpanShift(self.span, self.positions, BLOCK_IDS, rows)
        for layer in range(LAYERS):
            fresh = self.plain[layer][:, self.tokens] + self.changes[layer]
            keys = self.turned(fresh[:1], self.positions[:, OFFSET + self.tokens])[0]
            others = torch.full((1, HEADS, DIM), torch.nan)
            shift.apply(layer, torch.cat((others, keys)), torch.cat((others, fresh[1])))
        return torch.stack([torch.cat([self.read(layer, run) for run in REUSED], dim=1) for layer in range(LAYERS)])

    def read(self, layer: int, run: Run) -> torch.Tensor:
        return paged_rows.read(self.pages, BLOCK_IDS, run.start, run.end, layer)

    def moved(self, shift: torch.Tensor) -> torch.Tensor:
        """What reused tokens must hold when the others moved by `shift` [layers, 2, heads, dim]."""
        tokens = torch.cat([torch.arange(run.start, run.end) for run in REUSED])
        rows = self.plain[:, :, tokens - OFFSET] + shift[:, :, None]
        rows[:, 0] = self.turned(rows[:, 0], self.positions[:, tokens])
        return rows


def pages_of(layout: Layout) -> Pages:
    caches = [layout.allocate(NUM_BLOCKS, torch.float32).zero_() for _ in range(LAYERS)]
    return Pages([PagedLayer(str(i), cache, layout.update) for i, cache in enumerate(caches)], *layout.sizes)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Each number comes out of three turns and a handful of sums."""
    assert (found - expected).abs().max() <= 64 * EPS * expected.abs().max()


@every_layout
@every_style
def test_others_move_by_a_change_on_which_all_samples_agree(layout: Layout, is_neox: bool) -> None:
    change = torch.randn(LAYERS, 2, 1, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    scene = Scene(pages_of(layout), is_neox, change.expand(-1, -1, 4, -1, -1))
    assert_close(scene.run(), scene.moved(change[:, :, 0]))


@every_style
def test_samples_that_contradict_each_other_move_nothing(is_neox: bool) -> None:
    change = torch.randn(LAYERS, 2, 1, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    opposite = torch.cat((change, change, torch.zeros_like(change), -change), dim=2)
    scene = Scene(pages_of(halves()), is_neox, opposite)
    assert_close(scene.run(), scene.moved(torch.zeros(LAYERS, 2, HEADS, DIM)))


def test_each_head_is_judged_by_itself() -> None:
    change = torch.randn(LAYERS, 2, 1, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    mixed = torch.cat((change, change, torch.zeros_like(change), -change), dim=2)
    mixed[:, :, :, 1] = change[:, :, :, 1]
    expected = torch.zeros(LAYERS, 2, HEADS, DIM)
    expected[:, :, 1] = change[:, :, 0, 1]
    scene = Scene(pages_of(halves()), True, mixed)
    assert_close(scene.run(), scene.moved(expected))


def test_runs_count_alike_and_are_trusted_as_far_as_they_agree() -> None:
    """Two tokens of one run are one voice; the factor is the James-Stein one over the means of runs."""
    change = torch.randn(LAYERS, 2, 4, HEADS, DIM, generator=torch.Generator().manual_seed(2)) * 0.1 + 1
    expected = torch.zeros(LAYERS, 2, HEADS, DIM)
    for layer in range(LAYERS):
        for kv in range(2):
            for head in range(HEADS):
                rows = change[layer, kv, :, head].double()
                means = [(rows[0] + rows[1]) / 2, rows[2], rows[3]]
                mean = (means[0] + means[1] + means[2]) / 3
                spread = sum(float((m - mean).square().sum()) for m in means) / 2
                expected[layer, kv, head] = mean * max(0.0, 1 - spread / 3 / float(mean.square().sum()))
    scene = Scene(pages_of(halves()), True, change)
    assert_close(scene.run(), scene.moved(expected))


def test_a_single_run_is_believed() -> None:
    change = torch.randn(LAYERS, 2, 2, HEADS, DIM, generator=torch.Generator().manual_seed(2))
    scene = Scene(pages_of(halves()), True, change, samples=[Run(2, 4)])
    assert_close(scene.run(), scene.moved(change.mean(2)))


def test_nothing_but_reused_tokens_is_written() -> None:
    change = torch.ones(LAYERS, 2, 4, HEADS, DIM)
    scene = Scene(pages_of(halves()), True, change)
    scene.run()
    written = torch.zeros(NUM_BLOCKS, scene.pages.block_size, dtype=torch.bool)
    for run in REUSED:
        for position in range(run.start, run.end):
            block, offset = divmod(position, scene.pages.block_size)
            written[BLOCK_IDS[block], offset] = True
    for cache in scene.pages.caches:
        assert torch.equal(cache.abs().sum(dim=(1, 3, 4)) > 0, written)


def test_reused_tokens_that_no_layer_loaded_are_an_error() -> None:
    """An attention that does not call back between KV update and attention: the pages would hold something else."""
    generator = torch.Generator().manual_seed(4)
    request = Request(
        torch.zeros(OFFSET + LENGTH, dtype=torch.int64),
        torch.randint(0, 50, (3, OFFSET + LENGTH), generator=generator),
        [0, 1, 2, 3],
        [(OFFSET, torch.randn(LENGTH, WIDTH * (1 + LEVELS), generator=generator))],
    )
    entry, whole = torch.zeros(NUM_LAYERS, 2, LENGTH, HEADS, DIM), Run(OFFSET, OFFSET + LENGTH)
    span = ShiftedSpan(pages_of(halves()), Rope(torch.ones(3), True), OFFSET, entry, 0, REUSED)
    sequence = replace(request.input([Run(0, 4), *SAMPLES[1:]]), whole=(whole,), shifted={whole: span})
    PagedStack(Decoder(torch.float64)).recompute([sequence])
    assert "reused tokens are missing" in str(span.error)
