"""`vlcache calibrate` as a user runs it, and what its profile does: the model of the examples, the real engine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from grid_model import export, tasks

from command_line import ENVIRONMENT, RUN
from vlcache_connector.policy.profile import Profile, read, write

MODEL = Path(export.__file__).parent / "model"
ENGINE = {"max_model_len": 2048, "enforce_eager": True, "dtype": "bfloat16"}
RATIO, LENGTH, LAYERS = 0.1, 256, 5
SHARES = (2.0, 1.5, 1.0, 0.5, 0.0)
TOKENS = (52, 39, 26, 13, 0)
"""Of a picture, in each layer: 10 % times the shares, of 256, rounded up."""


class Commands:
    """`vlcache` with the model, in a folder with a task file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tasks = tasks.write(folder, 2, ["two pictures", "legend"])

    def start(self, name: str, *arguments: object, **connector: Any) -> subprocess.Popen[str]:
        command = [name, MODEL, self.tasks, "--engine", json.dumps(ENGINE), *arguments]
        command += ["--connector", json.dumps({"host_gib": 0.25, **connector})]
        environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}
        command = [sys.executable, "-c", RUN, *map(str, command)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, name: str, *arguments: object, **connector: Any) -> str:
        """Standard output."""
        process = self.start(name, *arguments, **connector)
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err[-4000:]
        return out


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def profile(commands: Commands) -> Path:
    path = commands.folder / "profile.json"
    (commands.folder / "shown.txt").write_text(
        commands.run("calibrate", "--output", path, "--ratio", RATIO, "--limit", 1)
    )
    return path


@pytest.fixture(scope="module", autouse=True)
def foreign(commands: Commands) -> Iterator[subprocess.Popen[str]]:
    """An engine with a profile of another model. It starts while the other tests run, to save time."""
    path = commands.folder / "foreign.json"
    write(path, Profile("0f" * 16, SHARES), {})
    process = commands.start("eval", "--policies", "layered", profile=str(path))
    yield process
    process.kill()
    process.communicate()


def test_a_profile_is_written_and_says_how_it_was_found(profile: Path) -> None:
    found = json.loads(profile.read_text())
    shares, measured = found["shares"], found["measured"]
    assert len(shares) == LAYERS and shares[0] > 0 and all(b <= a for a, b in pairwise(shares))
    assert (measured["ratio"], measured["questions"], measured["left_out"]) == (RATIO, 2, {})
    nothing, *_, uniform = [cut["kl"] for cut in measured["sensitivity"]]
    assert nothing > 0.1 > 10 * uniform, "naive reuse of numbered pictures is far off, 26 samples are not"
    assert measured["uniform"]["kl"] == uniform
    # On average over layers both recompute as many tokens, but for rounding up: two spans at most, one token in each.
    tried, spread = measured["found"]["recomputed_tokens"], measured["uniform"]["recomputed_tokens"]
    assert tried == pytest.approx(spread, abs=2)


def test_people_are_told_what_was_found_and_how_to_use_it(profile: Path) -> None:
    lines = (profile.parent / "shown.txt").read_text().splitlines()
    assert lines[0] == f"{MODEL}: 2 questions of {profile.parent / 'tasks.jsonl'}"
    assert [line.split()[0] for line in lines[3:9]] == ["0", "1", "2", "3", "4", "none"]
    assert json.loads(lines[-1][lines[-1].index("{") :]) == {"policy": "layered", "profile": str(profile)}


def test_layers_recompute_what_the_profile_gives_them(profile: Path, commands: Commands) -> None:
    report = commands.folder / "report.json"
    arguments = ["--policies", "layered,leading,shifted", "--ratios", RATIO, "--max-tokens", 4, "--json", report]
    changed = commands.folder / "changed.json"
    write(changed, replace(read(str(profile)), shares=SHARES), {})
    commands.run("eval", *arguments, profile=str(changed))
    rows = {(row["task"], row["policy"]): row for row in json.loads(report.read_text())["rows"]}
    for task in ("two pictures", "legend"):
        layered, leading, shifted = (rows[task, policy] for policy in ("layered", "leading", "shifted"))
        assert layered["declined"] == {}
        assert layered["not_reused"] == pytest.approx(sum(TOKENS) / LAYERS / LENGTH, abs=0.5 / LENGTH)
        assert leading["not_reused"] == shifted["not_reused"] == pytest.approx(26 / LENGTH)
        assert layered["kl"] != shifted["kl"], "deeper layers recompute less"


def test_a_profile_of_another_model_stops_the_engine(foreign: subprocess.Popen[str]) -> None:
    out, err = foreign.communicate(timeout=500)
    assert (foreign.returncode, out) == (1, "")
    assert "option 'profile' names a file that was made for another model" in err
    assert "vlcache eval: vLLM does not start: " in err
