"""Audits over the small decoder of `test_recompute`, whose pages are those of `exec.pages` here."""

import pytest
import torch

from exec.test_recompute import BLOCK_SIZE, NUM_BLOCKS, NUM_LAYERS, VOCABULARY, WIDTH, Decoder, PagedStack, Request
from vlcache_connector.exec import audit as audits
from vlcache_connector.exec.audit import Drift, audit
from vlcache_connector.exec.pages import PagedLayer, Pages
from vlcache_connector.types import Run

REUSED = [Run(3, 6), Run(8, 11)]
COMPUTED = [Run(0, 3), Run(6, 8), Run(11, 14)]


class Scene:
    """A prompt of 14 tokens in pages, of which `REUSED` were loaded: as they are when computed, plus noise."""

    def __init__(self, noise: float) -> None:
        self.stack = PagedStack(Decoder(torch.float32))
        stored = torch.full((NUM_LAYERS, NUM_BLOCKS, 2, BLOCK_SIZE, 1, WIDTH), torch.nan)
        self.stack.pages = _Slots(stored)  # type: ignore[assignment]
        layers = [PagedLayer(str(number), cache, _update) for number, cache in enumerate(stored)]
        self.pages = Pages(layers, BLOCK_SIZE, 1, WIDTH)
        ids = torch.randint(VOCABULARY, (14,), generator=torch.Generator().manual_seed(1))
        self.request = Request(ids, torch.arange(14).expand(3, -1), [3, 9, 1, 7], [])
        self.true = self.stack.passes().last_logits(self.request.input([Run(0, 14)]))
        self.slots = [slot for run in REUSED for slot in self.request.slots[run.start : run.end]]
        self.before = self.stack.pages[:, :, self.slots].clone()
        changed = torch.randn(self.before.shape, generator=torch.Generator().manual_seed(2))
        self.loaded = self.before + noise * changed
        for layer in range(NUM_LAYERS):
            for part in range(2):
                self.stack.pages[layer, part, torch.tensor(self.slots)] = self.loaded[layer, part]

    def audit(self) -> Drift:
        return audit(self.stack.passes(), self.pages, self.request.input(COMPUTED), REUSED)


class _Slots:
    """The pages as `PagedStack` indexes them: [layers, 2, slots, width]."""

    def __init__(self, stored: torch.Tensor) -> None:
        self._stored = stored

    def _flat(self) -> torch.Tensor:
        return self._stored.permute(0, 2, 1, 3, 4, 5).reshape(NUM_LAYERS, 2, -1, WIDTH)

    def __getitem__(self, index: object) -> torch.Tensor:
        found: torch.Tensor = self._flat()[index]  # type: ignore[index]
        return found

    def __setitem__(self, index: tuple[int, int, torch.Tensor], rows: torch.Tensor) -> None:
        layer, part, slots = index
        self._stored[layer, slots // BLOCK_SIZE, part, slots % BLOCK_SIZE, 0] = rows


def _update(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    cache[slots // BLOCK_SIZE, 0, slots % BLOCK_SIZE] = keys
    cache[slots // BLOCK_SIZE, 1, slots % BLOCK_SIZE] = values


def test_reuse_that_changes_nothing_has_no_drift() -> None:
    drift = Scene(noise=0.0).audit()
    # Runs are computed in other batches than the whole prompt: distances are rounding of fp32 sums of some 10 terms.
    assert all(distance < 1e-5 for distance in drift.distances)
    assert drift.kl is not None and abs(drift.kl) < 1e-9 and drift.is_same_token


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_distances_and_divergence_are_those_of_the_definition(noise: float) -> None:
    scene = Scene(noise)
    with_reuse = PagedStack(Decoder(torch.float32))
    for layer in range(NUM_LAYERS):
        with_reuse.pages[layer][:, scene.slots] = scene.loaded[layer]
    logits = with_reuse.passes().last_logits(scene.request.input(COMPUTED))
    drift = scene.audit()
    for layer in range(NUM_LAYERS):
        parts = [
            float((scene.loaded[layer, part] - scene.before[layer, part]).norm() / scene.before[layer, part].norm())
            for part in range(2)
        ]
        expected = ((parts[0] ** 2 + parts[1] ** 2) / 2) ** 0.5
        assert drift.distances[layer] == pytest.approx(expected, rel=1e-4)
    assert logits is not None and scene.true is not None
    p, q = scene.true.double().softmax(-1), logits.double().softmax(-1)
    assert drift.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)
    assert drift.is_same_token == bool(p.argmax() == q.argmax())
    assert drift.kl is not None and drift.kl > 1e-4


def test_damaged_values_leave_no_number_that_looks_fine() -> None:
    drift = Scene(noise=float("nan")).audit()
    assert drift.kl is not None and not drift.kl < 1e9
    assert all(not distance < 1e9 for distance in drift.distances)


def test_what_is_compared_of_a_long_prompt_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Scene(noise=1.0).audit()
    monkeypatch.setattr(audits, "_MAX_COMPARED", 3)
    part = Scene(noise=1.0).audit()
    assert part.kl == whole.kl
    for few, all_of_them in zip(part.squares, whole.squares, strict=True):
        assert 0 < few[0] < all_of_them[0] and 0 < few[1] < all_of_them[1]
    assert all(distance > 0.1 for distance in part.distances)


def test_ranks_add_their_heads_and_share_the_logits() -> None:
    one = Drift(((1.0, 0.0),), ((4.0, 9.0),), None, None)
    other = Drift(((3.0, 9.0),), ((12.0, 0.0),), 0.5, True)
    expected = Drift(((4.0, 9.0),), ((16.0, 9.0),), 0.5, True)
    assert one.merged(other) == expected == other.merged(one)
    assert expected.distances == pytest.approx([((4 / 16 + 9 / 9) / 2) ** 0.5])


def test_a_prompt_that_reuses_nothing_has_no_distance() -> None:
    scene = Scene(noise=0.0)
    drift = audit(scene.stack.passes(), scene.pages, scene.request.input([Run(0, 14)]), [])
    assert drift.distances == (0.0,) * NUM_LAYERS and drift.kl == 0.0
