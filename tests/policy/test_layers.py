"""Choices that differ from layer to layer: ratios for each, profiles, and tokens that a measure is to choose."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from vlcache_connector.errors import OptionError
from vlcache_connector.policy import POLICIES, Choice
from vlcache_connector.policy.deviation import Deviation
from vlcache_connector.policy.layered import Layered
from vlcache_connector.policy.profile import Profile, read, write
from vlcache_connector.types import Measure, Narrowing, Run

LENGTHS = [1, 2, 7, 16, 63, 256, 1000]
every_length = pytest.mark.parametrize("length", LENGTHS)


def tokens_by_layer(choice: Choice, num_layers: int) -> list[set[int]]:
    sets, runs = [], choice.runs
    for layer in range(num_layers):
        for narrowing in choice.narrowings:
            if narrowing.layer == layer:
                runs = narrowing.runs
                assert narrowing.count == sum(map(len, runs))
        sets.append({token for run in runs for token in range(run.start, run.end)})
    return sets


def chosen(policy: str, length: int, ratio: float, order: list[int]) -> set[int]:
    return {t for run in POLICIES[policy].recompute(length, ratio, order) for t in range(run.start, run.end)}


# -- ratios for each layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["leading", "shifted", "full", "none"])
@every_length
def test_each_layer_recomputes_what_its_own_ratio_says(policy: str, length: int) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        ratios = tuple(sorted((rng.choice([0.0, 0.02, 0.3, rng.random()]) for _ in range(6)), reverse=True))
        order = rng.sample(range(length), rng.randint(0, length))
        choice = POLICIES[policy].choose(length, ratios, 6, order)
        sets = tokens_by_layer(choice, 6)
        assert sets == [chosen(policy, length, ratio, order) for ratio in ratios]
        assert all(deeper <= before for before, deeper in itertools.pairwise(sets))
        layers = [narrowing.layer for narrowing in choice.narrowings]
        assert layers == [i for i in range(1, 6) if sets[i] != sets[i - 1]], "none where nothing changes"


@pytest.mark.parametrize("policy", ["leading", "shifted", "full", "none"])
@every_length
def test_one_ratio_is_the_same_in_all_layers(policy: str, length: int) -> None:
    for ratio in (0.0, 0.02, 0.5, 1.0):
        choice = POLICIES[policy].choose(length, ratio, 6)
        assert choice == Choice(POLICIES[policy].recompute(length, ratio))


# -- tokens that a measure is to choose -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "measure", "layer"),
    [("deviation", Measure.DEVIATION, Deviation.layer), ("scored", Measure.ATTENTION, 0)],
)
@every_length
def test_a_measure_chooses_as_many_as_the_ratio_says_of_all(
    policy: str, measure: Measure, layer: int, length: int
) -> None:
    assert POLICIES[policy].measure is measure and not POLICIES[policy].shifts
    for ratio in (1e-9, 0.02, 0.05, 0.5, 0.999):
        choice, count = POLICIES[policy].choose(length, ratio, 6), max(1, math.ceil(ratio * length - 1e-9))
        assert choice == Choice((Run(0, length),), (Narrowing(layer, count),) if count < length else ())


@pytest.mark.parametrize("policy", ["deviation", "scored"])
@every_length
def test_a_measure_has_nothing_to_choose_of_none_and_of_all(policy: str, length: int) -> None:
    assert POLICIES[policy].choose(length, 0.0, 6) == Choice(())
    assert POLICIES[policy].choose(length, 1.0, 6) == Choice((Run(0, length),))


# -- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100))
def test_a_ratio_buys_as_much_as_in_other_policies_shared_as_the_profile_says(seed: int) -> None:
    rng = random.Random(seed)
    shares = sorted((rng.choice([0.0, 1.0, rng.random()]) for _ in range(rng.randint(1, 12))), reverse=True)
    profile = Profile("", (max(shares[0], 0.1), *shares[1:]) if shares[0] else (0.5, *shares[1:]))
    shares, most = list(profile.shares), sum(share > 0 for share in profile.shares) / len(profile.shares)
    for ratio in (0.0, 0.02, 0.3, rng.random(), 1.0):
        ratios = profile.ratios(ratio)
        assert math.isclose(sum(ratios) / len(ratios), min(ratio, most), abs_tol=1e-9)
        assert all(0 <= one <= 1 + 1e-12 for one in ratios) and all(b <= a for a, b in itertools.pairwise(ratios))
        free = [(one, share) for one, share in zip(ratios, shares, strict=True) if 0 < one < 1]
        assert all(math.isclose(a[0] * b[1], b[0] * a[1], rel_tol=1e-9) for a, b in itertools.pairwise(free))


def test_a_layer_without_a_share_recomputes_nothing() -> None:
    assert Profile("", (1.0, 1.0, 0.0, 0.0)).ratios(0.1) == (0.2, 0.2, 0.0, 0.0)
    assert Profile("", (1.0, 1.0, 0.0, 0.0)).ratios(0.9) == (1.0, 1.0, 0.0, 0.0)


def test_layered_takes_the_tokens_of_shifted_and_shifts() -> None:
    layered = Layered(Profile("", (3.0, 1.0)))
    order = list(range(199, -1, -1))
    choice = layered.choose(200, 0.1, 2, order)
    assert layered.shifts and layered.measure is None
    assert tokens_by_layer(choice, 2) == [set(order[:30]), set(order[:12])], "twelve at least, as in shifted"


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = Profile("0123abcd", (1.0, 0.75, 0.75, 0.0))
    write(tmp_path / "profile.json", profile, {"kl": 0.5})
    assert read(str(tmp_path / "profile.json")) == profile
    assert json.loads((tmp_path / "profile.json").read_text())["measured"] == {"kl": 0.5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 1"),
        ({"model": None}, "which model"),
        ({"shares": []}, "list of numbers"),
        ({"shares": "1"}, "list of numbers"),
        ({"shares": [1, "1"]}, "list of numbers"),
        ({"shares": [1, True]}, "list of numbers"),
        ({"shares": [1, -1]}, "list of numbers"),
        ({"shares": [math.inf]}, "list of numbers"),
        ({"shares": [0, 0]}, "go down"),
        ({"shares": [0.5, 1]}, "go down"),
    ],
)
def test_a_damaged_profile_is_an_error_with_advice(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"version": 1, "model": "ab", "shares": [1, 0.5]} | change))
    with pytest.raises(OptionError, match=said) as caught:
        read(str(path))
    assert repr(str(path)) in str(caught.value) and "vlcache calibrate" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00"])
def test_a_file_that_is_no_profile_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(OptionError, match="profile"):
        read(str(tmp_path / "profile.json"))
    with pytest.raises(OptionError, match="cannot be read"):
        read(str(tmp_path))


def test_a_profile_of_another_model_is_refused() -> None:
    layered = Layered(Profile("ab", (1.0, 1.0)))
    layered.check("ab", 2)
    for model, num_layers in (("cd", 2), ("ab", 3)):
        with pytest.raises(OptionError, match="vlcache calibrate"):
            layered.check(model, num_layers)
