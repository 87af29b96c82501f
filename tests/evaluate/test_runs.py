"""Order of requests, results, and what is left to do when a run is started again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluate.fake_asker import FakeAsker, StopError
from evaluate.task_files import image, user, write
from vlcache_connector.evaluate.journal import Journal, JournalError
from vlcache_connector.evaluate.runs import NoReuseError, run
from vlcache_connector.evaluate.settings import Setting, settings_of
from vlcache_connector.evaluate.tasks import Question, read

ABOUT = {"model": "m", "max_tokens": 4}
SETTINGS = settings_of(["leading", "none"], [0.5, 0.05])
ONE = {"images": ["a.png"], "prompt": "?", "answer": "red"}
TWO = {"images": ["a.png", "b.png"], "prompt": "?", "answer": "red"}


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return read(write(tmp_path, ONE, TWO, ONE | {"prompt": "and?"}))


def asked(
    questions: list[Question], journal: Journal, asker: FakeAsker, settings: list[Setting] = SETTINGS
) -> FakeAsker:
    run(questions, settings, journal, lambda: asker)
    return asker


def results(questions: list[Question], journal: Journal) -> list[Any]:
    return [journal.results(question) for question in questions]


def test_settings_are_plain_the_yardstick_and_each_policy_at_each_ratio() -> None:
    names = [setting.name for setting in settings_of(["leading", "full", "none", "leading"], [0.5, 0.025, 0.5])]
    assert names == ["plain", "full", "leading 2.5 %", "leading 50 %", "none"]


def test_each_question_is_asked_in_every_setting_from_the_same_state(questions: list[Question]) -> None:
    calls = asked(questions[:2], Journal(None, ABOUT), FakeAsker()).calls
    every = [call for ratio in (1.0, "plain", 0.05, 0.5, 0.0) for call in ("forget", f"ask {ratio}")]
    assert calls == ["show", "forget all", "show", *every, "forget all", "show", "show", *every, "close"]


def test_a_result_is_compared_with_full_recompute(questions: list[Question]) -> None:
    journal = Journal(None, ABOUT)
    asked(questions, journal, FakeAsker())
    one, two = journal.results(questions[0]), journal.results(questions[1])
    assert {name for name, result in two.items() if not result.is_top1} == {"none", "leading 5 %"}
    assert all(result.is_top1 for result in one.values())
    assert two["full"].kl == two["plain"].kl == 0
    assert 0 < two["leading 50 %"].kl < two["leading 5 %"].kl < two["none"].kl
    assert (two["plain"].reason, two["none"].reason) == ("mode", None)
    assert (two["leading 5 %"].reused_tokens, two["leading 5 %"].recomputed_tokens) == (190, 12)
    assert (two["leading 5 %"].image_tokens, two["leading 5 %"].prompt_tokens) == (200, 220)


def test_a_picture_that_no_warm_up_shows_is_new_in_every_setting(tmp_path: Path) -> None:
    (question,) = read(write(tmp_path, TWO | {"warm": [[user(image("b.png"))]]}))
    asker = asked([question], Journal(None, ABOUT), FakeAsker())
    assert set(asker.asked) == {(str(tmp_path / "b.png"),)}
    assert asker.calls.count("forget all") == len(SETTINGS)


def test_progress_counts_results(questions: list[Question]) -> None:
    seen: list[int] = []
    run(questions, SETTINGS, Journal(None, ABOUT), FakeAsker, seen.append)
    assert seen == sorted(seen) and set(range(1, 16)) <= set(seen) and seen[-1] == 15


@pytest.mark.parametrize("answers", range(15))
def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_results(
    answers: int, questions: list[Question], tmp_path: Path
) -> None:
    whole = Journal(None, ABOUT)
    asked(questions, whole, FakeAsker())
    path = tmp_path / "results.jsonl"
    first, stopping = Journal(path, ABOUT), FakeAsker(stop_after=answers)
    with pytest.raises(StopError):
        asked(questions, first, stopping)
    assert stopping.calls[-1] == "close"
    first.close()

    second = Journal(path, ABOUT)
    asker = asked(questions, second, FakeAsker())
    second.close()
    assert sum(call.startswith("ask") for call in asker.calls) == 15 - answers // 5 * 5
    assert results(questions, second) == results(questions, whole)
    third = Journal(path, ABOUT)
    assert asked(questions, third, FakeAsker(stop_after=0)).calls == [], "nothing is left, no engine is started"
    assert results(questions, third) == results(questions, whole)


def test_new_settings_are_asked_beside_the_yardstick_alone(questions: list[Question], tmp_path: Path) -> None:
    whole, path = Journal(None, ABOUT), tmp_path / "results.jsonl"
    asked(questions, whole, FakeAsker())
    first = Journal(path, ABOUT)
    asked(questions, first, FakeAsker(), settings_of(["none"], []))
    first.close()
    second = Journal(path, ABOUT)
    asker = asked(questions[:1], second, FakeAsker())
    assert [call for call in asker.calls if call.startswith("ask")] == ["ask 1.0", "ask 0.05", "ask 0.5"]
    assert second.results(questions[0]) == whole.results(questions[0])


def test_a_question_that_was_changed_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path, ABOUT)
    asked(read(write(tmp_path, ONE, TWO)), journal, FakeAsker())
    journal.close()
    again = Journal(path, ABOUT)
    asker = asked(read(write(tmp_path, ONE | {"answer": "blue"}, TWO | {"prompt": "else?"})), again, FakeAsker())
    assert sum(call.startswith("ask") for call in asker.calls) == 5


def test_an_engine_that_declines_everything_is_an_error(questions: list[Question]) -> None:
    with pytest.raises(NoReuseError, match="this engine declines all reuse"):
        asked(questions, Journal(None, ABOUT), FakeAsker(declines="engine"))


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(questions: list[Question], tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    journal = Journal(path, ABOUT)
    asked(questions, journal, FakeAsker())
    journal.close()
    return path


def test_a_last_line_that_was_cut_off_is_dropped(kept: Path, questions: list[Question]) -> None:
    raw = kept.read_bytes()
    start = raw[:-1].rindex(b"\n") + 1
    for end in (start + 1, len(raw) - 40, len(raw) - 1):
        kept.write_bytes(raw[:end])
        journal = Journal(kept, ABOUT)
        assert [len(journal.results(question)) for question in questions] == [5, 5, 0]
        asked(questions, journal, FakeAsker())
        journal.close()
        assert kept.read_bytes() == raw


def test_a_first_line_that_was_cut_off_is_written_anew(kept: Path) -> None:
    header = kept.read_bytes().split(b"\n")[0]
    kept.write_bytes(header[:10])
    Journal(kept, ABOUT).close()
    assert kept.read_bytes() == header + b"\n"


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda record: [record],
    "no results": lambda record: {"question": record["question"]},
    "a result that lacks a field": lambda record: record["results"]["none"].pop("kl") and record,
    "a result with another field": lambda record: record["results"]["none"].update(more=1) or record,
    "a number that is text": lambda record: record["results"]["none"].update(kl="0") or record,
    "a text that is none": lambda record: record["results"]["none"].update(text=None) or record,
    "a result that is a list": lambda record: {**record, "results": {"none": []}},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_an_error_with_its_place(damage: str, kept: Path) -> None:
    lines = kept.read_text().splitlines()
    lines[2] = json.dumps(DAMAGE[damage](json.loads(lines[2])))
    kept.write_text("\n".join(lines) + "\n")
    with pytest.raises(JournalError, match=r"results.jsonl:3: not a line that vlcache eval writes"):
        Journal(kept, ABOUT)


@pytest.mark.parametrize("text", ["hello", "hello\n", "{}", "{}\n", "[]\n", "\n", "\x00\xff\n"])
def test_a_file_of_something_else_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(JournalError, match=r":1: not a line .* name another file with --resume"):
        Journal(path, ABOUT)
    assert path.read_text() == text


def test_results_about_something_else_are_refused(kept: Path) -> None:
    before = kept.read_bytes()
    with pytest.raises(JournalError, match="is about model 'm', this run about 'other'; name another file"):
        Journal(kept, ABOUT | {"model": "other"})
    assert kept.read_bytes() == before
    Journal(kept, ABOUT).close()


def test_two_runs_do_not_write_to_one_file(kept: Path) -> None:
    journal = Journal(kept, ABOUT)
    with pytest.raises(JournalError, match="in use by another vlcache eval"):
        Journal(kept, ABOUT)
    journal.close()
    Journal(kept, ABOUT).close()
