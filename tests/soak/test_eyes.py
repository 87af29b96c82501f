"""What the soak's auditors and its judge notice, on small made-up cases."""

from collections.abc import Sequence

import pytest
import torch

from soak.client import Answer
from soak.ledger import Ledger
from soak.rows import reused_row_problem, turned
from soak.traffic import Call, Traffic
from soak.verdict import Judge, compare, foretold_by_name, unplanned_errors
from vlcache_connector.exec.rope import Rope

ROPE = Rope(1 / 1e4 ** (torch.arange(4) / 4), is_neox=True)
KEY, OTHER = b"key", b"other"


@pytest.fixture
def slab() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8)


def test_an_untouched_entry_is_fine(slab: torch.Tensor) -> None:
    ledger = Ledger()
    ledger.wrote(slab, 64, 32, KEY)
    assert ledger.problem(slab, 64, 32, KEY) is None


@pytest.mark.parametrize("at", [64, 80, 95])
def test_a_flipped_bit_of_an_entry_is_noticed(slab: torch.Tensor, at: int) -> None:
    ledger = Ledger()
    ledger.wrote(slab, 64, 32, KEY)
    slab[at] ^= 1
    assert "changed" in (ledger.problem(slab, 64, 32, KEY) or "")


def test_another_entry_at_the_same_place_is_noticed(slab: torch.Tensor) -> None:
    ledger = Ledger()
    ledger.wrote(slab, 64, 32, KEY)
    assert "another key" in (ledger.problem(slab, 64, 32, OTHER) or "")
    assert "another size" in (ledger.problem(slab, 64, 16, KEY) or "")
    ledger.wrote(slab, 80, 8, OTHER)
    assert "overwritten" in (ledger.problem(slab, 64, 32, KEY) or "")


def test_an_entry_that_comes_back_from_a_lower_tier_must_be_as_it_was(slab: torch.Tensor) -> None:
    ledger = Ledger(comes_back=True)
    ledger.wrote(slab, 64, 32, KEY)
    slab[128:160] = slab[64:96]
    assert ledger.problem(slab, 128, 32, KEY) is None
    assert ledger.problem(slab, 128, 32, OTHER) is not None and ledger.problem(slab, 128, 16, KEY) is not None
    slab[140] ^= 1
    assert ledger.problem(slab, 128, 32, KEY) is not None


def stored_rows() -> torch.Tensor:
    return torch.randn(2, 2, 5, 2, 8, generator=torch.Generator().manual_seed(0))


def moved_rows(delta: int) -> torch.Tensor:
    """As the connector moves them: in float32."""
    rows = stored_rows()
    cos, sin = ROPE.turns(delta, torch.device("cpu"))
    a, b = rows[:, 0, ..., :4].clone(), rows[:, 0, ..., 4:].clone()
    rows[:, 0, ..., :4], rows[:, 0, ..., 4:] = a * cos - b * sin, b * cos + a * sin
    return rows


@pytest.mark.parametrize("delta", [0, 1, -7, 5000])
def test_rows_that_were_moved_in_float32_are_fine(delta: int) -> None:
    assert reused_row_problem(moved_rows(delta), stored_rows(), delta, ROPE) is None


def test_turning_keeps_the_length_of_every_pair() -> None:
    keys = stored_rows()[:, 0]
    expected, _ = turned(keys, 3, ROPE)
    assert torch.allclose(expected.norm(dim=-1), keys.double().norm(dim=-1), rtol=1e-12)


@pytest.mark.parametrize("delta", [0, 9])
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_one_number_of_a_reused_row_that_is_off_is_noticed(delta: int, part: int) -> None:
    rows = moved_rows(delta)
    rows[1, part, 4, 1, 7] += 1e-5
    assert reused_row_problem(rows, stored_rows(), delta, ROPE) is not None


def test_rows_moved_to_the_neighbouring_position_are_noticed() -> None:
    assert reused_row_problem(moved_rows(8), stored_rows(), 9, ROPE) is not None


TOP = {"token_id:1": -0.1, "token_id:2": -2.5, "token_id:3": -9.0}


@pytest.mark.parametrize(
    ("tokens", "top", "is_wrong"),
    [
        (["token_id:1"], TOP, False),
        (["token_id:1"], TOP | {"token_id:2": -2.51}, True),
        (["token_id:2"], TOP, True),
        (["token_id:2"], TOP | {"token_id:1": -2.4999}, True),
        (["token_id:1"], {"token_id:7": -0.1}, True),
    ],
)
def test_an_answer_is_wrong_when_its_numbers_or_its_tokens_are(
    tokens: Sequence[str], top: dict[str, float], is_wrong: bool
) -> None:
    assert (compare(tokens, [top], ["token_id:1"], [TOP], 1e-3).problem is not None) == is_wrong


def test_of_two_tokens_that_are_as_likely_either_may_come_and_nothing_behind_is_compared() -> None:
    close = {"token_id:1": -0.7, "token_id:2": -0.7001, "token_id:3": -9.0}
    found = compare(["token_id:2", "token_id:9"], [close, {}], ["token_id:1", "token_id:1"], [close, TOP], 1e-3)
    assert found.problem is None


def test_an_approximate_answer_is_compared_with_what_was_foretold_of_it() -> None:
    call = Call(7, 0, "reuse 0.3", {}, max_tokens=1)
    report = {"approximate": True, "reason": "in_prefix_cache"}
    events = [
        {"kind": "foretold", "at_s": 2.0, "request": f"chatcmpl-{call.name}-x", "how": "loaded", "top": [[1, -0.1]]},
        {"kind": "foretold", "at_s": 1.0, "request": f"chatcmpl-{call.name}-x", "how": "loaded", "top": [[2, -0.1]]},
    ]
    for logprob, num_wrong in ((-0.1, 0), (-0.2, 1)):
        judge = Judge([], 1e-6)
        judge.take([Answer(call, ["token_id:1"], [{"token_id:1": logprob}], report)])
        judge.finish(foretold_by_name(events), ())
        assert judge.counts["compared: loaded"] == 1 and len(judge.wrong) == num_wrong
    taken_away = {"kind": "asked_again", "at_s": 3.0, "request": f"chatcmpl-{call.name}-x"}
    assert foretold_by_name([*events, taken_away]) == {}


def test_a_missing_answer_is_noticed_and_a_client_that_hung_up_is_none() -> None:
    judge = Judge([], 1e-6)
    call = Call(1, 0, "off", {}, max_tokens=2)
    judge.take([Answer(call, error="status 500"), Answer(call, ["token_id:1"], [TOP]), Answer(call, has_given_up=True)])
    assert len(judge.failed) == 2 and judge.counts["given up"] == 1


def test_only_tracebacks_that_were_not_planted_are_errors() -> None:
    log = (
        "(EngineCore pid=1) ERROR 11-23 19:00:00 [a.py:1] Traceback (most recent call last):\n"
        "(EngineCore pid=1) ERROR 11-23 19:00:00 [a.py:1] soak.faults.PlantedError: planted in positions\n"
        "(EngineCore pid=1) ERROR 11-23 19:00:00 [a.py:1] AssertionError: two entries share bytes\n"
        "(APIServer pid=2) WARNING 11-23 19:00:00 [b.py:1] all is well\n"
    )
    assert unplanned_errors(log) == ["AssertionError: two entries share bytes"]


def test_the_same_seed_gives_the_same_traffic() -> None:
    one, other = Traffic(3, 20, 8), Traffic(3, 20, 8)
    assert one.scenes == other.scenes
    assert [one.call(i) for i in range(50)] == [other.call(i) for i in range(50)]
