"""Calibration through an engine that answers by rule, and the command as far as it goes without a real one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from command_line import Run
from evaluate.fake_asker import FakeAsker
from evaluate.task_files import write
from vlcache_connector.evaluate import calibration_report as report
from vlcache_connector.evaluate.calibration import Calibration, about_asked, calibrate
from vlcache_connector.evaluate.meter import Meter
from vlcache_connector.evaluate.runs import NoReuseError, RefusedError, Reply
from vlcache_connector.evaluate.tasks import Chat, Question, images_of, read
from vlcache_connector.policy import profile
from vlcache_connector.policy.profile import Profile

ONE: dict[str, Any] = {"images": ["a.png"], "prompt": "?"}
TWO: dict[str, Any] = {"images": ["a.png", "b.png"], "prompt": "?"}


class FrontAsker(FakeAsker):
    """Only the first layer matters."""

    def share(self, ratio: float | list[float]) -> float:
        return ratio[0] if isinstance(ratio, list) else ratio


class HesitantAsker(FakeAsker):
    """Declines more than a quarter, from two pictures on, as when that does not pay."""

    def ask(self, chat: Chat, options: Mapping[str, Any]) -> Reply:
        reply = super().ask(chat, options)
        if 0.25 < self.share(options["recompute_ratio"]) < 1 and len(images_of(chat)) > 1:
            reply.report["reason"] = "no_gain"  # type: ignore[index]
        return reply


def calibrated(asker: FakeAsker, questions: Sequence[Question], ratio: float = 0.4) -> Calibration:
    """Of a model of five layers."""
    return calibrate(asker, questions, 5, ratio, lambda count: None, lambda warning: None)


def test_the_yardstick_is_asked_once_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    asker, questions = FakeAsker(), read(write(tmp_path, ONE, TWO))
    counts: list[int] = []
    meter = Meter(asker, questions, counts.append)
    low, middle, high = ((each, each) for each in (0.0, 0.2, 0.4))
    first = meter.measure([low, high, low])
    each = ["forget", "ask 1.0", "forget", "ask [0.0, 0.0]", "forget", "ask [0.4, 0.4]"]
    assert asker.calls == ["forget all", "show", *each, "forget all", "show", "show", *each]
    asker.calls.clear()
    again = meter.measure([high, middle])
    each = ["forget", "ask [0.2, 0.2]"]
    assert asker.calls == ["forget all", "show", *each, "forget all", "show", "show", *each]
    assert first[0] == first[2] > again[1] > again[0] == first[1] > 0
    assert counts == [1, 2, 3, 4]
    assert meter.measured(high).recomputed_tokens == (42 + 82) / 2 and meter.smallest_span == 100


def test_a_mean_is_that_of_each_question_alone(tmp_path: Path) -> None:
    questions = read(write(tmp_path, ONE, TWO))
    alone = [Meter(FakeAsker(), [question], lambda count: None).measure([(0.2, 0.1)]) for question in questions]
    meter = Meter(FakeAsker(), questions, lambda count: None)
    (together,) = meter.measure([(0.2, 0.1)])
    assert meter.measured((0.2, 0.1)).kls == (alone[0][0], alone[1][0])
    assert together == pytest.approx((alone[0][0] + alone[1][0]) / 2)


def test_questions_without_reuse_are_left_out(tmp_path: Path) -> None:
    lines = [{"prompt": "no picture"}, ONE, ONE | {"warm": []}, TWO]
    found = calibrated(FakeAsker(), read(write(tmp_path, *lines)))
    assert found.left_out == {"no_media": 1, "miss": 1} and found.num_questions == 2
    assert found.uniform == calibrated(FakeAsker(), read(write(tmp_path, ONE, TWO))).uniform
    assert any("left out, by reason: 1 miss, 1 no_media" in line for line in report.lines(found, tmp_path / "p.json"))


def test_a_question_that_is_declined_later_is_in_no_mean_any_more(tmp_path: Path) -> None:
    asker, questions = HesitantAsker(), read(write(tmp_path, ONE, TWO))
    meter = Meter(asker, questions, lambda count: None)
    both = meter.measure([(0.2, 0.2)])
    (high,) = meter.measure([(0.4, 0.4)])
    one, ways = Meter(FakeAsker(), questions[:1], lambda count: None), [(0.2, 0.2), (0.4, 0.4)]
    assert meter.measure(ways) == one.measure(ways) and high == meter.measure(ways)[1]
    assert both[0] > meter.measure(ways)[0]
    assert (meter.num_questions, meter.left_out) == (1, {"no_gain": 1})


def test_without_any_reuse_there_is_nothing_to_measure(tmp_path: Path) -> None:
    cold = read(write(tmp_path, {"prompt": "no picture"}, ONE | {"warm": []}))
    with pytest.raises(NoReuseError, match=r"no question has pictures that are reused \(1 miss, 1 no_media\)"):
        calibrated(FakeAsker(), cold)
    with pytest.raises(NoReuseError, match="this engine declines all reuse"):
        calibrated(FakeAsker(declines="engine"), read(write(tmp_path, ONE)))


def test_a_question_that_the_engine_refuses_is_named(tmp_path: Path) -> None:
    class RefusingAsker(FakeAsker):
        def show(self, chat: Chat) -> None:
            raise RefusedError("too long")

    with pytest.raises(RefusedError, match="question 'seven': too long"):
        calibrated(RefusingAsker(), read(write(tmp_path, ONE | {"id": "seven"})))


def test_shares_that_are_better_go_into_the_profile(tmp_path: Path) -> None:
    found = calibrated(FrontAsker(), read(write(tmp_path, TWO, TWO | {"prompt": "and?"})))
    assert found.gain.is_sure and found.shares == found.result.shares and found.shares[0] > 1.4
    assert found.found.kl < 0.8 * found.uniform.kl
    path = tmp_path / "profile.json"
    report.write(path, "0f" * 8, found)
    assert profile.read(str(path)) == Profile("0f" * 8, found.shares)
    measured = json.loads(path.read_text())["measured"]
    assert (measured["ratio"], measured["questions"]) == (0.4, 2)
    assert measured["uniform"]["kl"] == found.uniform.kl and measured["found"]["kl"] == found.found.kl
    assert [cut["kl"] for cut in measured["sensitivity"]] == list(found.sensitivity)
    assert [tuple(step["quanta"]) for step in measured["steps"]] == [step.quanta for step in found.result.steps]


def test_people_see_each_group_and_what_to_do_with_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    found = calibrated(FrontAsker(), read(write(tmp_path, TWO, TWO | {"prompt": "and?"})))
    rows = list(report.table(found))
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "none"]
    assert [row[2] for row in rows[:-1]] == [f"{share:.2f}" for share in found.shares]
    assert float(rows[0][1]) > float(rows[1][1]) == float(rows[-1][1]) == float(f"{found.uniform.kl:.2g}")
    first, *_, last = report.lines(found, path)
    assert f"uniform {found.uniform.kl:.2g}, found {found.found.kl:.2g}" in first
    assert json.loads(last[last.index("{") :]) == {"policy": "layered", "profile": str(path)}


def test_uniform_shares_are_kept_where_nothing_is_better(tmp_path: Path) -> None:
    found = calibrated(FakeAsker(), read(write(tmp_path, ONE, TWO)))
    assert not found.gain.is_sure and found.shares == (1.0,) * 5
    assert any("uniform shares are not worse" in line for line in report.lines(found, tmp_path / "p.json"))


def test_progress_comes_about_as_far_as_it_said(tmp_path: Path) -> None:
    questions, counts = read(write(tmp_path, ONE, TWO)), list[int]()
    calibrate(FrontAsker(), questions, 5, 0.4, counts.append, lambda warning: None)
    assert counts == list(range(1, len(counts) + 1))
    assert 0.5 < len(counts) / about_asked(2, 5, 0.4) < 2


def test_the_warning_comes_while_there_is_time_to_stop(tmp_path: Path) -> None:
    warnings: list[tuple[int, str]] = []
    counts: list[int] = [0]
    questions = read(write(tmp_path, ONE, TWO))
    calibrate(FakeAsker(), questions, 5, 0.02, counts.append, lambda line: warnings.append((counts[-1], line)))
    ((asked, line),) = warnings
    assert asked == 2 < counts[-1] and "a picture has 100 tokens" in line


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --output"),
        (["--output", "p.json", "--ratio", "0"], "'0' is no ratio"),
        (["--output", "p.json", "--ratio", "1.5"], "'1.5' is no ratio"),
        (["--output", "p.json", "--ratio", "nan"], "'nan' is no ratio"),
        (["--output", "p.json", "--ratio", "much"], "'much' is no ratio"),
        (["--output", "p.json", "--limit", "0"], "not a whole number from 1"),
        (["--output", "p.json", "--engine", "[1]"], "is not an object"),
        (["--output", "p.json", "--connector", '{"host": 1}'], "did you mean 'host_gib'?"),
        (["--output", "p.json", "--connector", '{"policy": "none"}'], "has 'policy', which changes"),
        (["--output", "p.json", "--connector", '{"recompute_tokens": 99}'], "has 'recompute_tokens', which changes"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments: list[str], message: str, tmp_path: Path, run: Run) -> None:
    status, out, err = run("calibrate", "m", write(tmp_path, ONE), *arguments)
    assert (status, out) == (2, "") and message in err


@pytest.mark.parametrize(
    ("output", "message"), [("", "is a folder; name a file"), ("missing/profile.json", "whose folder is not there")]
)
def test_a_profile_that_cannot_be_written_is_an_error_before_an_engine_starts(
    output: str, message: str, tmp_path: Path, run: Run
) -> None:
    status, out, err = run("calibrate", "m", write(tmp_path, ONE), "--output", tmp_path / output)
    assert (status, out) == (1, "") and err.startswith("vlcache calibrate: --output is ") and message in err


def test_a_file_without_questions_is_an_error_before_an_engine_starts(tmp_path: Path, run: Run) -> None:
    status, out, err = run("calibrate", "m", write(tmp_path, ""), "--output", tmp_path / "profile.json")
    assert (status, out) == (1, "") and "has no questions" in err
    assert not (tmp_path / "profile.json").exists()
