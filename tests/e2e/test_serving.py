"""What a user types: `vllm serve` with one flag, in several processes, with the engine's compilation on."""

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from checkpoints import cached_checkpoint
from e2e.engine import CONNECTOR, Picture
from e2e.server import Server
from vlcache_connector.cli import main

A, NEW = Picture(1), Picture(2)
LIMITS = ("--max-model-len", "4096", "--block-size", "32", "--limit-mm-per-prompt", '{"image": 4, "video": 1}')


def flag(**options: Any) -> tuple[str, str]:
    return "--kv-transfer-config", json.dumps(CONNECTOR | {"kv_connector_extra_config": {"host_gib": 0.25} | options})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint = cached_checkpoint("qwen2_5_vl", 256, 4, root=Path(".checkpoints"))
    started = Server(checkpoint, tmp_path_factory.mktemp("server") / "server.log", *LIMITS, *flag())
    try:
        yield started.wait_until_ready()
    finally:
        started.close()


def chat(server: Server, *parts: str | Picture, params: dict[str, Any] | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "tested",
        "messages": [{"role": "user", "content": content_of(*parts)}],
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    if params is not None:
        body["kv_transfer_params"] = {"vlcache": params}
    return server.post("/v1/chat/completions", body)


def content_of(*parts: str | Picture) -> list[dict[str, Any]]:
    """Of a message."""
    return [_part(part) for part in parts]


def _part(part: str | Picture) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    file = io.BytesIO()
    part.pixels().save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def first_logprobs(answer: dict[str, Any]) -> dict[str, float]:
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {entry["token"]: entry["logprob"] for entry in top}


def test_one_flag_makes_a_recurring_picture_cheap_through_the_api(server: Server) -> None:
    first = chat(server, "look: ", A, "what is it?")["kv_transfer_params"]["vlcache"]
    assert first["reused_tokens"] == 0 and first["reason"] == "miss"
    answer = chat(server, "other words come first this time: ", A, "and now?")
    report = answer["kv_transfer_params"]["vlcache"]
    assert report["reused_tokens"] > 80 and report["tier"] == "host"
    total = sum(report[f"{kind}_tokens"] for kind in ("reused", "recomputed", "computed", "prefix_cached"))
    assert total == answer["usage"]["prompt_tokens"]


def test_full_recompute_agrees_with_plain_under_compilation(server: Server) -> None:
    """The pass runs what the engine compiled, with other batches: other kernels, another order of sums."""
    prompt = ("full recompute: ", A, "what is it?")
    chat(server, A)
    recomputed = chat(server, *prompt, params={"recompute_ratio": 1.0})
    assert recomputed["kv_transfer_params"]["vlcache"]["recomputed_tokens"] > 80
    plain = [chat(server, *prompt, params={"mode": "off"}) for _ in range(2)]
    ours, (one, other) = first_logprobs(recomputed), map(first_logprobs, plain)
    common = ours.keys() & one.keys()
    assert len(common) >= 10
    noise = max(abs(one[token] - other[token]) for token in one.keys() & other.keys())
    # Logits are sums of 256 products; a bfloat16 hidden state of 4 layers carries about 4 independent roundings per
    # element.
    rounding = 8 * 2.0**-8
    assert max(abs(ours[token] - one[token]) for token in common) <= 2 * noise + rounding


def test_an_idle_server_learns_a_picture_that_was_first_seen_behind_a_known_one(server: Server) -> None:
    chat(server, A)
    chat(server, "known first: ", A, " and then ", NEW, "same?")
    deadline = time.monotonic() + 60
    while "vllm:vlcache_compiled_entries_total" not in server.get("/metrics") or metric(server, "compiled_entries") < 1:
        # The engine reports what it did while idle with the next request.
        assert time.monotonic() < deadline, "the idle engine computed nothing"
        chat(server, "ping")
    report = chat(server, "alone: ", NEW, "what?")["kv_transfer_params"]["vlcache"]
    assert report["reused_tokens"] > 80


def test_vlcache_explain_shows_the_plan_for_a_prompt(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(server, A)
    file = tmp_path / "a.png"
    A.pixels().save(file)
    arguments = ["explain", "--url", server.url, "never before ", str(file), "what?", "--recompute-ratio", "0.2"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "80 reused" in shown and "image 0" in shown and "approximate" in shown
    assert main(["explain", "--url", server.url, "--json", "another ", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["spans"][0]["is_known"]
    assert main(["explain", "--url", server.url, "--model", "unknown", "text"]) == 1
    assert "404" in capsys.readouterr().err


def test_vlcache_warm_makes_pictures_known_before_somebody_asks(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [Picture(number) for number in (31, 32, 33)]
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, file in zip(pictures, files, strict=True):
        picture.pixels().save(file)
    command = ["warm", "--url", server.url, *map(str, files)]
    assert main([*command, str(files[0]), "--check"]) == 0
    assert capsys.readouterr().out == "3 files: 3 computed, 0 known before, 0 failed\n"
    report = chat(server, "asked for the first time: ", pictures[1], "what?")["kv_transfer_params"]["vlcache"]
    assert report["reused_tokens"] > 80
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    assert main([*command, str(broken), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [file["outcome"] for file in result["files"]] == ["known"] * 3 + ["failed"]
    assert "answered 400" in result["files"][3]["error"]
    assert main([*command, "--cache-salt", "somebody else"]) == 0
    assert "3 computed" in capsys.readouterr().out


def test_vlcache_warm_and_explain_take_videos_as_well(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, video = tmp_path / "beside.png", tmp_path / "moving.MP4"
    Picture(41).pixels().save(picture)
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 2.0, (224, 168))
    for number in range(8):
        writer.write(np.array(Picture(50 + number).pixels().resize((224, 168))))
    writer.release()
    assert main(["warm", "--url", server.url, str(video), str(picture), "--check"]) == 0
    assert capsys.readouterr().out == "2 files: 2 computed, 0 known before, 0 failed\n"

    url = "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
    asked = [{"type": "text", "text": "for the first time: "}, {"type": "video_url", "video_url": {"url": url}}]
    messages = [{"role": "user", "content": [*asked, {"type": "text", "text": "what happens?"}]}]
    answer = server.post("/v1/chat/completions", {"model": "tested", "messages": messages, "max_tokens": 1})
    report = answer["kv_transfer_params"]["vlcache"]
    assert report["reused_tokens"] > 80 and "reason" not in report

    assert main(["explain", "--url", server.url, "what is in ", str(video), " and ", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "video 0" in shown and "image 1" in shown and "not in the store" not in shown


def metric(server: Server, name: str) -> float:
    lines = [line for line in server.get("/metrics").splitlines() if line.startswith(f"vllm:vlcache_{name}_total{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_metrics_count_what_happened(server: Server) -> None:
    before = {name: metric(server, name) for name in ("hits", "reused_tokens", "declines")}
    chat(server, A)
    report = chat(server, "metrics: ", A)["kv_transfer_params"]["vlcache"]
    chat(server, "metrics: ", A, params={"mode": "off"})
    assert metric(server, "hits") >= before["hits"] + 1
    assert metric(server, "reused_tokens") >= before["reused_tokens"] + report["reused_tokens"]
    assert metric(server, "declines") >= before["declines"] + 1


def test_the_server_says_that_the_flag_opened_embedding_inputs(server: Server) -> None:
    assert "embedding inputs" in server.log_text()


def test_a_wrong_option_stops_the_server_with_a_sentence(tmp_path: Path) -> None:
    checkpoint = cached_checkpoint("qwen2_5_vl", 256, 4, root=Path(".checkpoints"))
    server = Server(checkpoint, tmp_path / "server.log", *LIMITS, "--enforce-eager", *flag(recompute_ratoi=0.1))
    try:
        assert server.wait_until_gone() != 0
        assert "has no option 'recompute_ratoi'; did you mean 'recompute_ratio'?" in server.log_text()
    finally:
        server.close()
