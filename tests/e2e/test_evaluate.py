"""`vlcache eval` as a user runs it: the trained model of the examples, known answers, the real engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grid_model import export, tasks

from command_line import ENVIRONMENT, RUN

MODEL = Path(export.__file__).parent / "model"
ENGINE = {"max_model_len": 2048, "enforce_eager": True, "dtype": "bfloat16"}
QUESTIONS = 8
SETTINGS = ("--policies", "leading,none", "--ratios", "0.05")


class Evaluation:
    """`vlcache eval` on task files of one folder, with its results in one file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tasks = tasks.write(folder, QUESTIONS, ["one picture", "50 words before", "two pictures"])

    def run(self, *arguments: str, **engine: Any) -> subprocess.CompletedProcess[str]:
        command = ["eval", str(MODEL), str(self.tasks), *SETTINGS, "--max-tokens", "4"]
        command += ["--engine", json.dumps(ENGINE | engine), "--connector", '{"host_gib": 0.25}', *arguments]
        environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}
        return subprocess.run(
            [sys.executable, "-c", RUN, *command], env=environment, capture_output=True, text=True, timeout=500
        )


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return Evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def rows(evaluation: Evaluation) -> dict[tuple[str, str], dict[str, Any]]:
    files = {name: str(evaluation.folder / name) for name in ("report.json", "results.jsonl")}
    answer = evaluation.run("--json", files["report.json"], "--resume", files["results.jsonl"])
    assert answer.returncode == 0, answer.stderr[-4000:]
    found = json.loads(Path(files["report.json"]).read_text())["rows"]
    return {(row["task"], row["setting"]): row for row in found}


def test_full_recompute_is_plain_vllm_and_both_are_right(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    for setting in ("plain", "full"):
        row = rows["total", setting]
        assert row["asked"] == 3 * QUESTIONS and row["right"] >= 0.9
        assert row["top1"] == row["agrees"] == 1 and row["kl_max"] < 1e-3
    assert rows["total", "full"]["recomputed"] > 0.9 and rows["total", "full"]["reused"] == 0


def test_pictures_are_reused_as_much_as_the_setting_says(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    for task in ("one picture", "50 words before", "two pictures"):
        assert rows[task, "none"]["not_reused"] == 0 and rows[task, "none"]["declined"] == {}
        assert rows[task, "leading 5 %"]["not_reused"] == pytest.approx(13 / 256)  # of 256 tokens, rounded up
        assert rows[task, "plain"]["not_reused"] == 1
        assert all(rows[task, setting]["kl_rest"] == 0 for setting in ("plain", "none")), "320 words are all known"


def test_questions_about_one_picture_keep_their_answers(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    for task in ("one picture", "50 words before"):
        for setting in ("none", "leading 5 %"):
            assert rows[task, setting]["agrees"] == 1 and rows[task, setting]["kl"] < 0.1


def test_naive_reuse_is_worse_where_pictures_are_numbered(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    naive, full = rows["two pictures", "none"], rows["two pictures", "full"]
    assert naive["right"] < full["right"] and naive["agrees"] < 1
    assert naive["kl"] > 0.1 > 100 * rows["50 words before", "none"]["kl"]


@pytest.mark.usefixtures("rows")
def test_a_run_that_is_complete_needs_no_engine(evaluation: Evaluation) -> None:
    """A model that is not there could not be started."""
    results = evaluation.folder / "results.jsonl"
    header, *lines = results.read_text().splitlines(keepends=True)
    moved = evaluation.folder / "moved.jsonl"
    moved.write_text(header.replace(str(MODEL), "nowhere") + "".join(lines))
    command = ["eval", "nowhere", str(evaluation.tasks), *SETTINGS, "--max-tokens", "4"]
    command += ["--engine", json.dumps(ENGINE), "--connector", '{"host_gib": 0.25}', "--resume", str(moved)]
    answer = subprocess.run([sys.executable, "-c", RUN, *command], env=ENVIRONMENT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "two pictures" in answer.stdout and "total" in answer.stdout


def test_an_engine_that_does_not_start_is_one_line(evaluation: Evaluation) -> None:
    answer = evaluation.run(no_such_option=1)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.splitlines()[-1].startswith("vlcache eval: vLLM does not start: ")
    assert "no_such_option" in answer.stderr.splitlines()[-1]
