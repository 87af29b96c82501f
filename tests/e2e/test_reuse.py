"""Reuse at any position, on both model families, against plain computation by the same engine.

The yardstick of agreement is the engine's own noise: how far the log-probabilities of a prompt move when plain vLLM
serves it once computed and once from its prefix cache, over prompts of which 1 to 32 tokens are left behind the
cached blocks. Everything that is exact in theory must stay within twice the largest noise seen (the sum of two such
deviations), plus the resolution of a float32 log-probability of size 10.
"""

from collections.abc import Sequence

import pytest

from e2e import inside
from e2e.engine import Answer, Ask, Engine, Part, Picture

A, B, C = Picture(1), Picture(2), Picture(3, 392, 224)
OPEN, CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
LONG = "def visit(self, node): return self.generic_visit(node)\n" * 6

SCENES: dict[str, Sequence[str | Picture]] = {
    "under shorter text": [OPEN, A, "what is it?", CLOSE],
    "under longer text": [OPEN, LONG, A, "what is it?", CLOSE],
    "under no text at all": [A, "what is it?", CLOSE],
    "two in the order seen": [OPEN, "look: ", A, B, "same?", CLOSE],
    "two in the other order": [OPEN, "look: ", B, A, "same?", CLOSE],
    "text between": [OPEN, B, LONG, A, "and?", CLOSE],
    "the same twice": [OPEN, A, " once more ", A, "same?", CLOSE],
    "different sizes": [OPEN, C, A, "larger?", CLOSE],
    "as the very last tokens": [OPEN, "look: ", B, Picture(1, is_closed=False)],
    "three": [OPEN, C, "x", A, "y", B, "z", CLOSE],
}
RESOLUTION = 2.0**-20  # spacing of float32 numbers between 8 and 16


def show_pictures(engine: Engine) -> None:
    """Let the store see A, B and C, each alone and under text that no scene has."""
    for picture in (A, B, C):
        answer = engine.ask_one(Ask([OPEN, "first seen here ", picture, CLOSE]))
        assert answer.report["reused_tokens"] == 0
    engine.forget()


def plain(engine: Engine, parts: Sequence[Part]) -> Answer:
    engine.forget()
    return engine.ask_one(Ask(parts, "off"))


def answers_alone(engine: Engine, asks: Sequence[Ask]) -> list[Answer]:
    """Each request on its own, with empty caches before and after."""
    answers = []
    for ask in asks:
        engine.forget()
        answers.append(engine.ask_one(ask))
    engine.forget()
    return answers


def noise_of(engine: Engine, media: Sequence[Part] = (A, B)) -> float:
    gaps = []
    for length in range(32):  # each way in which a prompt can stand to the block borders
        parts = [OPEN, *media, " x" * length, CLOSE]
        computed = plain(engine, parts)
        from_cache = engine.ask_one(Ask(parts, "off"))
        assert from_cache.num_cached_tokens > 0
        gaps.append(computed.gap(from_cache))
    return max(gaps)


@pytest.fixture(scope="module")
def bound(exact_engine: Engine) -> float:
    return 2 * noise_of(exact_engine) + RESOLUTION


@pytest.fixture(scope="module")
def bound_bf16(engine: Engine) -> float:
    return 2 * noise_of(engine) + RESOLUTION


@pytest.mark.parametrize("scene", SCENES)
def test_recomputing_everything_equals_plain_vllm(fresh: Engine, bound: float, scene: str) -> None:
    show_pictures(fresh)
    expected = plain(fresh, SCENES[scene])
    fresh.forget()
    answer = fresh.ask_one(Ask(SCENES[scene], ratio=1.0))
    assert answer.report["recomputed_tokens"] > 0 and answer.report["reused_tokens"] == 0, answer
    assert answer.gap(expected) <= bound


@pytest.mark.parametrize("scene", SCENES)
def test_recomputing_everything_equals_plain_vllm_in_bfloat16_with_chunked_prefill(
    fresh_bf16: Engine, bound_bf16: float, scene: str
) -> None:
    show_pictures(fresh_bf16)
    expected = plain(fresh_bf16, SCENES[scene])
    fresh_bf16.forget()
    answer = fresh_bf16.ask_one(Ask(SCENES[scene], ratio=1.0))
    assert answer.report["recomputed_tokens"] > 0 and answer.report["reused_tokens"] == 0, answer
    assert answer.gap(expected) <= bound_bf16


@pytest.mark.parametrize("scene", SCENES)
def test_reuse_covers_the_prompt_up_to_the_last_picture_without_the_encoder(fresh: Engine, scene: str) -> None:
    show_pictures(fresh)
    assert fresh.call(inside.count_encoder_runs) == 3
    answer = fresh.ask_one(Ask(SCENES[scene], ratio=0.05))
    report = answer.report
    assert report["reused_tokens"] > 0 and report["tier"] == "host" and report["approximate"]
    covered = report["reused_tokens"] + report["recomputed_tokens"]
    assert answer.num_cached_tokens == covered, "vLLM counts the covered range as cached"
    assert covered + report["computed_tokens"] == answer.num_prompt_tokens
    assert fresh.call(inside.count_encoder_runs) == 0


def test_reuse_is_an_approximation_that_naive_copying_is_not(fresh: Engine) -> None:
    """The same prompt at rising ratios: identical to plain at 1.0 only, so the test would notice if nothing were
    reused.
    """
    show_pictures(fresh)
    scene = SCENES["two in the other order"]
    expected = plain(fresh, scene)
    gaps = {}
    for ratio in (0.0, 0.05, 1.0):
        fresh.forget()
        gaps[ratio] = fresh.ask_one(Ask(scene, ratio=ratio)).gap(expected)
    assert gaps[0.05] > gaps[1.0] and gaps[0.0] > gaps[1.0]


def test_requests_of_one_step_do_not_disturb_each_other(fresh: Engine, bound: float) -> None:
    """Reuse of several requests shares a pass, next to text-only requests and requests that decode."""
    show_pictures(fresh)
    asks = [Ask(SCENES[name], ratio=ratio, max_tokens=4) for name in SCENES for ratio in (0.05, 1.0)][:7]
    asks.append(Ask([OPEN, LONG, CLOSE], max_tokens=4))
    alone = answers_alone(fresh, asks)
    for one, other, ask in zip(alone, fresh.ask(*asks), asks, strict=True):
        assert one.gap(other) <= bound, ask
        assert one.token_ids[0] == other.token_ids[0] or abs(_margin(one)) <= bound


def _margin(answer: Answer) -> float:
    first, second = sorted(answer.logprobs.values(), reverse=True)[:2]
    return first - second


def test_new_pictures_before_and_behind_known_ones_are_computed(fresh: Engine, bound: float) -> None:
    show_pictures(fresh)
    new, newer = Picture(11), Picture(12)
    behind = [OPEN, A, "and", new, "same?", CLOSE]
    expected = plain(fresh, behind)
    fresh.forget()
    answer = fresh.ask_one(Ask(behind, ratio=1.0))
    assert answer.gap(expected) <= bound
    assert 0 < answer.report["recomputed_tokens"] < answer.num_prompt_tokens / 1.5

    before = [OPEN, newer, "and", A, "same?", CLOSE]
    expected = plain(fresh, before)
    fresh.forget()
    answer = fresh.ask_one(Ask(before, ratio=0.05))
    assert answer.report["reason"] == "behind_new_image"
    assert answer.report["reused_tokens"] == 0 and answer.gap(expected) <= bound


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 60, 64, 96, 100, 128, 160])
def test_reuse_builds_on_a_prefix_that_ends_anywhere(fresh: Engine, bound: float, cut: int) -> None:
    """The engine's own prefix cache covers the prompt up to before, inside or behind a picture, at and off block
    borders.
    """
    show_pictures(fresh)
    parts = [OPEN, "look closely: ", A, "then", B, "same?", CLOSE]
    expected = plain(fresh, parts)
    for ratio in (1.0, 0.05):
        fresh.forget()
        cached = fresh.call(inside.compute_prefix, Ask(parts, "off", max_tokens=2), cut)
        answer = fresh.ask_one(Ask(parts, ratio=ratio))
        report = answer.report
        assert report["prefix_cached_tokens"] == cached
        covered = report["reused_tokens"] + report["recomputed_tokens"]
        assert answer.num_cached_tokens == cached + covered
        if ratio == 1.0:
            assert answer.gap(expected) <= bound
