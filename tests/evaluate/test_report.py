"""Tables and plots of results, and the command as far as it goes without an engine."""

import json
import os
import pty
import termios
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import Run, process_of
from evaluate.fake_asker import FakeAsker
from evaluate.task_files import write
from vlcache_connector.evaluate import report
from vlcache_connector.evaluate.journal import Journal
from vlcache_connector.evaluate.report import Row, is_right, rows_of
from vlcache_connector.evaluate.runs import run as ask_all
from vlcache_connector.evaluate.settings import Setting, settings_of
from vlcache_connector.evaluate.statistics import wilson
from vlcache_connector.evaluate.tasks import Question, read

SETTINGS = settings_of(["leading", "none"], [0.05, 0.5])
NAMES = [setting.name for setting in SETTINGS]
# What the command itself puts into a journal, so that it can show one without an engine.
ABOUT: dict[str, Any] = {"model": "m", "max_tokens": 32, "logprobs": 1024, "engine": {}, "connector": {}}


def one(task: str, **fields: Any) -> dict[str, Any]:
    return {"images": ["a.png"], "prompt": f"{task}?", "answer": "red", "task": task, **fields}


def two(task: str, **fields: Any) -> dict[str, Any]:
    return one(task, images=["a.png", "b.png"], **fields)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks; what the engine of the tests does not know is the answer to the fourth question."""
    lines = [one("single"), one("single", answer=["green", "Red."]), two("both"), two("both", answer="green")]
    return write(tmp_path, *lines, two("both", prompt="else?"))


def rows_by_name(questions: Sequence[Question], settings: list[Setting] = SETTINGS) -> dict[tuple[str, str], Row]:
    journal = Journal(None, ABOUT)
    ask_all(questions, settings, journal, FakeAsker)
    return {(row.task, row.setting): row for row in rows_of(questions, settings, journal, "exact")}


def test_there_is_a_row_for_each_task_and_for_all_in_every_setting(tasks: Path) -> None:
    rows = rows_by_name(read(tasks))
    assert list(rows) == [(task, name) for task in ("single", "both", "total") for name in NAMES]
    assert [rows[task, "plain"].asked for task in ("single", "both", "total")] == [2, 3, 5]


def test_rows_say_how_many_answers_were_right_and_how_many_agree(tasks: Path) -> None:
    rows = rows_by_name(read(tasks))
    assert [rows["single", name].right for name in NAMES] == [1.0] * 5
    assert [rows["both", name].right for name in NAMES] == pytest.approx([2 / 3, 2 / 3, 0, 2 / 3, 0])
    assert [rows["both", name].agrees for name in NAMES] == [1, 1, 0, 1, 0]
    assert [rows["both", name].top1 for name in NAMES] == [1, 1, 0, 1, 0]
    assert rows["total", "none"].right == pytest.approx(2 / 5) and rows["total", "none"].interval == wilson(2, 5)
    assert rows["total", "none"].agrees == pytest.approx(2 / 5)


def test_shares_are_of_all_tokens_of_a_task(tasks: Path) -> None:
    rows = rows_by_name(read(tasks))
    assert rows["single", "leading 5 %"].reused == pytest.approx(95 / 120)
    assert rows["single", "leading 5 %"].recomputed == pytest.approx(7 / 120)
    assert rows["total", "leading 5 %"].reused == pytest.approx((2 * 95 + 3 * 190) / (2 * 120 + 3 * 220))
    assert [rows["total", name].not_reused for name in NAMES] == pytest.approx([1, 1, 0.05, 0.5, 0])
    assert rows["total", "plain"].ttft_s == pytest.approx(0.22)


def test_a_mean_divergence_is_over_all_questions_and_the_largest_is_shown(tasks: Path) -> None:
    rows = rows_by_name(read(tasks))
    single, both, total = (rows[task, "none"] for task in ("single", "both", "total"))
    assert 0 < single.kl < both.kl and total.kl == pytest.approx((2 * single.kl + 3 * both.kl) / 5)
    assert total.kl_max == both.kl_max
    assert rows["total", "full"].kl == 0


def test_requests_that_were_declined_are_counted_by_reason(tmp_path: Path) -> None:
    questions = read(write(tmp_path, one("t"), one("t", id="cold", warm=[]), {"prompt": "no picture", "task": "t"}))
    rows = rows_by_name(questions)
    assert rows["t", "plain"].declined == {}, "plain was not to reuse anything"
    assert rows["t", "none"].declined == {"miss": 1, "no_media": 1}
    journal = Journal(None, ABOUT)
    ask_all(questions, SETTINGS, journal, FakeAsker)
    shown = list(report.table(rows_of(questions, SETTINGS, journal, "exact")))
    assert shown[NAMES.index("none")][-1] == "1 miss, 1 no_media"


def test_without_known_answers_there_is_agreement_alone(tmp_path: Path) -> None:
    rows = rows_by_name(read(write(tmp_path, {"images": ["a.png"], "prompt": "?"})))
    row = rows["all", "none"]
    assert (row.right, row.interval, row.agrees) == (None, None, 1.0)
    assert next(report.table([row]))[3:5] == ["-", "-"]
    assert any("no question has an answer" in note for note in report.notes([row]))


@pytest.mark.parametrize(
    ("text", "answers", "exact", "contains"),
    [
        (" c5   Green.\n", ["c5 green"], True, True),
        ("green", ["red", "GREEN"], True, True),
        ("It is green", ["green"], False, True),
        ("greenish", ["green"], False, False),
        ("", ["green"], False, False),
    ],
)
def test_what_is_right(text: str, answers: list[str], exact: bool, contains: bool) -> None:
    assert is_right(text, answers, "exact") is exact
    assert is_right(text, answers, "contains") is contains


def test_a_divergence_that_is_a_bound_is_said_to_be_one(tasks: Path) -> None:
    row = rows_by_name(read(tasks))["total", "none"]
    assert not any("lower bound" in note for note in report.notes([row]))
    assert any("up to 0.002 of the probability" in note for note in report.notes([row, replace(row, kl_rest=0.002)]))


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tasks: Path, tmp_path: Path) -> list[object]:
    """Arguments of a run whose answers are all in its file already, so that no engine is needed."""
    journal = Journal(tmp_path / "results.jsonl", ABOUT)
    ask_all(read(tasks), SETTINGS, journal, FakeAsker)
    journal.close()
    results = tmp_path / "results.jsonl"
    return ["eval", "m", tasks, "--policies", "leading,none", "--ratios", "0.05,0.5", "--resume", results]


def test_the_command_shows_a_table_and_writes_the_same_as_data(
    finished: list[object], run: Run, tmp_path: Path
) -> None:
    status, out, err = run(*finished, "--json", tmp_path / "report.json")
    assert (status, err) == (0, "")
    title, _, header, *lines = out.splitlines()
    assert title == f"m: 5 questions of {tmp_path / 'tasks.jsonl'}"
    assert header.split() == " ".join(report.TITLES).split()
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["model"], found["match"]) == ("m", "exact")
    assert [(row["task"], row["setting"]) for row in found["rows"]] == [
        (task, name) for task in ("single", "both", "total") for name in NAMES
    ]
    for line, row in zip(lines, found["rows"], strict=False):
        assert line.removeprefix(row["task"]).lstrip().startswith(row["setting"])
        assert f" {row['asked']} " in line and f" {row['right']:.3f} " in line and f" {row['kl']:.2g} " in line
        assert f" {100 * row['reused']:.1f} % " in line and line.endswith(f" {1000 * row['ttft_s']:.0f} ms")
    assert lines[15] == "" and lines[16].startswith("AGREES, TOP-1, KL")


def test_progress_is_a_bar_at_a_terminal_and_the_table_stays_clean(finished: list[object], runtime: Path) -> None:
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    vlcache = process_of(runtime, *finished, stderr=terminal)
    out, _ = vlcache.communicate()
    assert vlcache.returncode == 0
    assert "eval" not in out and out.startswith("m: 5 questions of ")
    os.set_blocking(screen, False)
    shown = os.read(screen, 1 << 16)
    assert b"eval:" in shown and b"/25 " in shown
    os.close(terminal)
    os.close(screen)


def test_a_plot_is_drawn(finished: list[object], run: Run, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("matplotlib", reason="an optional package; needed for this test alone")
    assert run(*finished, "--plot", tmp_path / "plot.png")[0] == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not [warning for warning in recwarn if "matplotlib" in str(warning.filename)]


def test_a_plot_that_cannot_be_written_comes_behind_the_table(finished: list[object], run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an optional package; needed for this test alone")
    status, out, err = run(*finished, "--plot", tmp_path / "plot.unknown")
    assert status == 1 and "AGREES" in out and "cannot be written" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "leeding"], "there is no policy 'leeding'; there are "),
        (["--policies", ""], "there is no policy ''"),
        (["--policies", "layered"], "the policy 'layered' needs a profile"),
        (["--policies", "layered", "--connector", '{"profile": "missing.json"}'], "'missing.json': it cannot be read"),
        (["--ratios", "0,5"], "'5' is no ratio"),
        (["--ratios", "nan"], "'nan' is no ratio"),
        (["--connector", '{"host": 1}'], "did you mean 'host_gib'?"),
        (["--connector", '{"policy": "none"}'], "use --policies"),
        (["--connector", '{"recompute_ratio": 0.1}'], "use --ratios"),
        (["--engine", "[1]"], "is not an object"),
        (["--engine", "{"], "not JSON"),
        (["--limit", "0"], "not a whole number from 1"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments: list[str], message: str, tasks: Path, run: Run) -> None:
    status, out, err = run("eval", "m", tasks, *arguments)
    assert (status, out) == (2, "") and message in err


def test_a_bad_task_file_is_an_error_before_an_engine_starts(tmp_path: Path, run: Run) -> None:
    path = write(tmp_path, one("t", images=["c.png"]))
    status, out, err = run("eval", "m", path)
    assert (status, out) == (1, "") and err.startswith(f"vlcache eval: {path}:1: the picture 'c.png' cannot be read")
    status, _, err = run("eval", "m", tmp_path / "missing.jsonl")
    assert status == 1 and "No such file" in err
