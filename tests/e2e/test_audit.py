"""Audits and the drift guard in the real engine, with the grid model, which was trained: its answers depend on what is
where in which picture, so that reuse which goes wrong shows in the first token.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid_model.pictures import draw
from grid_model.scenes import Scene, ask, new_scene

from e2e import inside
from e2e.engine import Answer, Ask, Engine, Picture
from vlcache_connector.engine import piece_loader
from vlcache_connector.plan.drift import MIN_TO_RAISE, WINDOW

MODEL = Path("examples/grid_model/model")
RATIOS = [0.05, 0.1, 0.2, 0.4, 0.5]  # that the guard goes through
LIMIT = 0.1


class GridPicture(Picture):
    def pixels(self) -> Any:
        return draw(scene_of(self.seed).pictures[0])


def scene_of(seed: int) -> Scene:
    return new_scene(np.random.default_rng(seed))


def numbered(seed: int) -> Ask:
    """A question about one of two pictures that text numbers."""
    pictures = [GridPicture(2 * seed), GridPicture(2 * seed + 1)]
    scene = Scene(np.concatenate([scene_of(picture.seed).pictures for picture in pictures]))
    (question,) = ask(scene, np.random.default_rng(seed), {"at": 1.0, "where": 1.0, "which": 1.0}, 1)
    parts: list[str | Picture] = ["<|im_start|>"]
    for number, picture in enumerate(pictures):
        parts += [f" {' '.join(scene.before_picture(number))} ", picture]
    return Ask([*parts, f" {' '.join(question.words)} "])


def single(seed: int) -> Ask:
    """A question about one picture behind other text."""
    scene = replace(scene_of(seed), filler=new_scene(np.random.default_rng(seed), filler=20).filler)
    (question,) = ask(scene, np.random.default_rng(seed), {"at": 1.0, "where": 1.0}, 1)
    return Ask([f"<|im_start|> {' '.join(scene.filler)} ", GridPicture(seed), f" {' '.join(question.words)} "])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("audit") / "engine.log"
    with pytest.MonkeyPatch.context() as patch:  # for so small a model a second thread would only wait
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        engine = Engine(
            MODEL, log, {"audit_fraction": 1.0, "recompute_ratio": RATIOS[0]}, dtype="bfloat16", max_model_len=2048
        )
    engine.call(inside.watch_counters)
    yield engine
    engine.close()


@pytest.fixture
def engine(running: Engine) -> Iterator[Engine]:
    """As configured, with empty caches; afterwards nothing is pinned or under way."""
    running.forget()
    running.call(inside.reset_store)
    running.call(inside.run_idle)
    running.call(inside.counters)
    yield running
    running.call(inside.repair)
    running.call(inside.run_idle)
    running.call(inside.check_store)


def show(engine: Engine, *asks: Ask) -> None:
    """Each picture of these requests alone."""
    for picture in {part for one in asks for part in one.parts if isinstance(part, Picture)}:
        engine.ask_one(Ask(["<|im_start|>", picture, " colour at c5 "]))


def ask_idly(engine: Engine, *asks: Ask) -> list[Answer]:
    """Each from an empty prefix cache, with time for its audit."""
    answers = []
    for one in asks:
        engine.forget()
        answers.append(engine.ask_one(one))
        engine.call(inside.run_idle)
    return answers


def ratio_of(engine: Engine) -> float:
    """The default recompute ratio; 1 while reuse is off."""
    return float(engine.call(_level))


def _level(llm: Any) -> float:
    audits = inside.core(llm).scheduler.connector._scheduler._audits
    return 1.0 if audits.is_off else float(audits.options.recompute_ratio)


# -- a clean run ------------------------------------------------------------------------------------------------------


def test_a_clean_run_never_triggers_the_guard(engine: Engine) -> None:
    asks = [make(seed) for seed in range(WINDOW // 2) for make in (single, numbered)]
    show(engine, *asks)
    free = engine.call(inside.num_free_blocks)
    answers = ask_idly(engine, *asks)
    assert all(answer.report["reused_tokens"] > 0 for answer in answers)
    counts = engine.call(inside.counters)
    assert counts["audits"] == len(asks) and ratio_of(engine) == 0.05
    assert np.mean(counts["drift_kl"]) < LIMIT
    assert engine.call(inside.num_free_blocks) == free


def test_naive_reuse_of_numbered_pictures_is_seen_to_drift_further(engine: Engine) -> None:
    asks = [numbered(seed) for seed in range(WINDOW // 2)]
    show(engine, *asks)
    means = {}
    for policy, ratio in (("shifted", 0.05), ("none", 0.0)):
        ask_idly(engine, *(replace(one, policy=policy, ratio=ratio) for one in asks))
        counts = engine.call(inside.counters)
        means[policy] = float(np.mean(counts["drift_kl"]))
    assert means["none"] > LIMIT and means["none"] > 2 * means["shifted"]
    assert ratio_of(engine) == 0.05, "a ratio that requests choose is their own affair"


# -- faults -----------------------------------------------------------------------------------------------------------


def turn_keys_wrongly(llm: Any) -> None:
    """By so many positions that the slowest pair of dimensions turns, too: this model finds cells by content, and
    turning the fast pairs alone (by 10,000 positions, say) moves its answers by 1e-4 nats.
    """
    delta = piece_loader.position_delta
    piece_loader.position_delta = lambda stored, wanted: delta(stored, wanted) + 10_000_019
    inside._undo.append(lambda: setattr(piece_loader, "position_delta", delta))


def damage_entries(llm: Any) -> None:
    """All KV of all entries becomes noise, so loud that no share of recomputed tokens makes up for it."""
    side, index = inside.worker(llm), inside.session(llm).index
    generator = torch.Generator().manual_seed(1)
    for entry in index._entries.values():
        if entry.entry_class.kind == "kv":
            kv = side._session.slab.kv(entry.extent, entry.num_tokens)
            inside._undo.append(partial(kv.copy_, kv.clone()))
            kv.copy_(100 * torch.randn(kv.shape, generator=generator))


def change_weights(llm: Any) -> None:
    """And keep entries of the old ones."""
    for layer in inside.model(llm).language_model.model.layers:
        weight = layer.input_layernorm.weight.data
        inside._undo.append(partial(weight.copy_, weight.clone()))
        weight[::4] *= -1


FAULTS = [turn_keys_wrongly, damage_entries, change_weights]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_the_guard_reacts_to_a_fault_at_once(engine: Engine, fault: Any) -> None:
    asks = [numbered(seed) for seed in range(MIN_TO_RAISE)]
    show(engine, *asks)
    engine.call(fault)
    ask_idly(engine, *asks)
    counts = engine.call(inside.counters)
    assert ratio_of(engine) == RATIOS[1], f"{counts['drift_kl']}"


def test_reuse_is_switched_off_when_nothing_else_helps_and_comes_back_when_audits_are_good(engine: Engine) -> None:
    asks = [numbered(seed) for seed in range(MIN_TO_RAISE)]
    show(engine, *asks)
    engine.call(damage_entries)
    ratios = []
    while ratio_of(engine) < 1.0 and len(ratios) < 4 * len(RATIOS):
        ratios.append(ratio_of(engine))
        ask_idly(engine, *asks)
    assert list(dict.fromkeys(ratios)) == RATIOS and ratio_of(engine) == 1.0
    assert {answer.report["reason"] for answer in ask_idly(engine, *asks)} == {"drift"}
    assert "reuse is switched off" in engine.log_text()

    engine.call(inside.repair)
    for _ in range(WINDOW // MIN_TO_RAISE + 1):
        ask_idly(engine, *asks)
    assert ratio_of(engine) < 1.0 and "reuse is switched on again" in engine.log_text()
    assert ask_idly(engine, replace(asks[0], ratio=0.05))[0].report["reused_tokens"] > 0
