"""Beside LMCache's `LMCacheMPConnector`, with a real `lmcache server`, both in one `MultiConnector`.

As processes of their own: in one process, vLLM 0.32 imports lmcache before its worker, which then does not start.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import cached_checkpoint
from e2e.engine import CONNECTOR, Picture
from e2e.lmcache_server import lmcache_server
from e2e.server import Server
from e2e.test_serving import LIMITS, content_of, first_logprobs, metric
from store.remote_tiers import needs_lmcache

pytestmark = needs_lmcache
TESTS = Path(__file__).parent.parent
CHUNK_TOKENS = 64  # of what LMCache keeps
A, B = Picture(1), Picture(2)  # of the same size: 100 tokens
HEAD = "some words before it. "
# LMCache keeps as many tokens from the start as the engine has computed, and those that ours loads are not among them:
# the tail is longer than what precedes it, so the whole picture is kept.
TAIL = "and a question that is longer than the picture, so that all of the picture is kept by the other one " * 9
RESOLUTION = 1e-4  # of a log-probability in float32; what differs, differs by 100 times as much


@pytest.fixture
def lmcache_port(tmp_path: Path) -> Iterator[int]:
    with lmcache_server(tmp_path / "lmcache.log", CHUNK_TOKENS) as port:
        yield port


@pytest.fixture
def server(request: pytest.FixtureRequest, lmcache_port: int, tmp_path: Path) -> Iterator[Server]:
    """Both connectors in one engine; the parameter is the module that ours is taken from."""
    ours = CONNECTOR | {"kv_connector_module_path": request.param, "kv_connector_extra_config": {"host_gib": 0.25}}
    extra = {"lmcache.mp.port": lmcache_port}
    theirs = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    children = {"connectors": [ours, theirs]}
    both = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": children}
    flags = ("--enforce-eager", "--dtype", "float32", "--enable-prompt-tokens-details")
    checkpoint = cached_checkpoint("qwen2_5_vl", 256, 4, root=Path(".checkpoints"), dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH", "")))))
        patch.setenv("LMCACHE_TRACK_USAGE", "false")
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")  # as users have it: numbers are written to the log, too
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # so that its prefix cache can be emptied
        started = Server(checkpoint, tmp_path / "server.log", *LIMITS, *flags, "--kv-transfer-config", json.dumps(both))
    try:
        yield started.wait_until_ready()
    finally:
        started.close()


def ask(server: Server, picture: Picture, head: str = HEAD, salt: str = "shared", **params: Any) -> dict[str, Any]:
    """An answer of an engine whose own prefix cache is empty: what is cached, LMCache has given."""
    server.reset("prefix")
    body = {
        "model": "tested",
        "messages": [{"role": "user", "content": content_of(head, picture, TAIL)}],
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
        "cache_salt": salt,
        "kv_transfer_params": {"vlcache": params},
    }
    return server.post("/v1/chat/completions", body)


def report_of(answer: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = answer["kv_transfer_params"]["vlcache"]
    return report


def num_cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of log-probabilities over the likeliest tokens; infinite where hardly any is the same."""
    ours, theirs = first_logprobs(one), first_logprobs(other)
    common = ours.keys() & theirs.keys()
    return max(abs(ours[token] - theirs[token]) for token in common) if len(common) >= 5 else float("inf")


@pytest.mark.parametrize("server", ["vlcache_connector"], indirect=True)
def test_only_what_is_exact_is_reused_beside_lmcache(server: Server) -> None:
    first = ask(server, A)
    assert report_of(first)["reason"] == "sibling" and num_cached(first) == 0
    known = ask(server, A)
    assert num_cached(known) > 2 * CHUNK_TOKENS and gap(known, first) <= RESOLUTION, "LMCache goes on"
    other = ask(server, B)
    assert num_cached(other) < 100, "it tells pictures of the same size apart"
    assert gap(other, first) > 100 * RESOLUTION

    before = metric(server, "loaded_embeddings")
    server.reset("encoder")
    moved = ask(server, A, head="quite other words in front of it: ")
    assert report_of(moved)["reason"] == "sibling" and report_of(moved)["reused_tokens"] == 0
    ask(server, B)  # the engine reports what it did with the next request
    assert metric(server, "loaded_embeddings") > before, "encoder outputs are reused"
    assert metric(server, "loaded_bytes") == 0 and metric(server, "failures") == 0
    assert "LMCacheMPConnector in the same engine" in server.log_text()


@pytest.mark.parametrize("server", ["e2e.trusting"], indirect=True)
def test_lmcache_would_give_approximate_kv_to_requests_that_did_not_agree_to_it(server: Server) -> None:
    """Why reuse is declined beside it. When this fails, it may not have to be any more."""
    exact = ask(server, A, salt="alone", mode="off")
    ask(server, A, head="where it was seen first: ")
    approximate = ask(server, A, recompute_ratio=0.05)
    assert report_of(approximate)["reused_tokens"] > 80
    assert gap(approximate, exact) > 100 * RESOLUTION, "the difference shows"
    mistaken = ask(server, A, mode="off")
    assert num_cached(mistaken) > 100 and report_of(mistaken)["reason"] == "mode"
    assert gap(mistaken, approximate) <= RESOLUTION < gap(mistaken, exact) / 100
