"""Every example runs, on the small model of the repository, and says at its end what was saved."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from offline import GRID_MODEL
from savings import Answer, Savings

EXAMPLES = GRID_MODEL.parents[1]
SAVED = re.compile(
    r"saved: (\d+) of (\d+) prompt tokens reused \((\d+) recomputed\), (\d+) encoder runs avoided, "
    r"[\d.]+ s instead of [\d.]+ s"
)
START_TIMEOUT_S = 400


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLCACHE_RUNTIME_DIR": str(tmp_path_factory.mktemp("s")),
        "PYTHON": sys.executable,
    }
    return {**os.environ, **settings}


def encoder_runs_saved(output: str) -> int:
    """From the one line that says what was saved."""
    found = [match for line in output.splitlines() if (match := SAVED.fullmatch(line))]
    assert len(found) == 1, output[-2000:]
    reused, total, recomputed, encoder_runs = map(int, found[0].groups())
    assert 0 < recomputed < reused < total
    return encoder_runs


@pytest.mark.parametrize(("name", "num_runs"), [("offline", 4), ("rag_pages", 9), ("new_policy", 2)])
def test_an_example_in_one_process_reuses_every_known_picture(
    name: str, num_runs: int, environment: dict[str, str]
) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    if name != "new_policy":  # whose module must reach the engine's own process; one process starts sooner
        environment = {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-4000:]
    assert encoder_runs_saved(answer.stdout) == num_runs
    if name == "offline":
        # With two pictures that the text numbers, the default ratio keeps most answers, not all.
        assert re.search(r"[23] of 3 answers are those of plain vLLM", answer.stdout)
    if name == "new_policy":
        runs = re.findall(
            r"picture at (\d+), 256 tokens: recomputed \[\[(\d+), (\d+)\], \[(\d+), (\d+)\]\]", answer.stdout
        )
        assert len(runs) == 2
        for at, *edges in (map(int, each) for each in runs):
            assert [edge - at for edge in edges] == [0, 11, 250, 256], "both ends"


@pytest.fixture(scope="module")
def served(environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """`serve.sh`: what it printed until it served, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [str(EXAMPLES / "serve.sh"), "grid_model/model", "--port", port, "--enforce-eager"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving on"):
                break
        yield "".join(lines), f"http://127.0.0.1:{port}"
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_serve_shows_reuse_in_the_response_and_goes_on_serving(served: tuple[str, str]) -> None:
    output, url = served
    assert encoder_runs_saved(output) == 1
    assert '"kv_transfer_params": {' in output and '"reason": "mode"' in output
    assert f"serving on {url}" in output


def test_a_conversation_reuses_photographs_of_an_earlier_one(
    served: tuple[str, str], environment: dict[str, str]
) -> None:
    command = [sys.executable, str(EXAMPLES / "multi_turn.py"), "--url", served[1]]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-4000:]
    # Both photographs in the second conversation, and one again when its oldest turn was dropped; besides, pictures
    # whose last tokens lie behind the last full block of a prefix hit.
    assert encoder_runs_saved(answer.stdout) >= 3


def test_an_example_that_reused_nothing_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    report = {f"{kind}_tokens": 0 for kind in ("reused", "recomputed", "prefix_cached")}
    computed = Answer("red", 0.1, report | {"computed_tokens": 7, "plan": {"spans": [{"reused": []}]}})
    savings = Savings()
    savings.show("new", computed, computed)
    assert savings.close() == 1
    assert SAVED.search(capsys.readouterr().out)
