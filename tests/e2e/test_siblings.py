"""Beside vLLM's `LMCacheMPConnector`, with a real `lmcache server`, both in one `MultiConnector`."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e import inside
from e2e.conftest import Start
from e2e.engine import CONNECTOR, Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, RESOLUTION, A, B, noise_of
from redis_server import free_port
from store.remote_tiers import needs_lmcache

pytestmark = needs_lmcache
START_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def lmcache_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a running `lmcache server`."""
    port, http_port = free_port(), free_port()
    log = tmp_path_factory.mktemp("lmcache") / "server.log"
    command = [str(Path(sys.executable).parent / "lmcache"), "server", "--port", str(port), "--http-port"]
    command += [str(http_port), "--l1-size-gb", "1", "--eviction-policy", "LRU", "--chunk-size", "64"]
    command += ["--supported-transfer-mode", "engine_driven", "--disable-observability"]
    environment = os.environ | {"LMCACHE_TRACK_USAGE": "false"}
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{http_port}/", timeout=5).close()
                break
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"lmcache server did not start:\n{log.read_text()[-3000:]}") from None
                time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def engine(start_here: Start, lmcache_port: int) -> Engine:
    extra = {"lmcache.mp.port": lmcache_port}
    theirs = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    children: list[dict[str, Any]] = [CONNECTOR | {"kv_connector_extra_config": {"host_gib": 0.03}}, theirs]
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": children},
    }
    engine = start_here("both", "qwen2_5_vl", "float32", None, kv_transfer_config=both)
    engine.call(inside.count_encoder_runs)
    return engine


def test_lmcache_takes_one_image_for_another_of_the_same_size(engine: Engine) -> None:
    """It keys by token ids, which are the same for both: approximate KV would be found under exact keys as well."""

    def ask(picture: Any, salt: str) -> Any:
        engine.forget()
        answer = engine.ask_one(Ask([OPEN, LONG, picture, LONG, "what is it?", CLOSE], "off", salt=salt, max_tokens=4))
        engine.ask_one(Ask(["a text of no interest"], "off", salt="none", max_tokens=4))  # time to store
        return answer

    limit = 2 * noise_of(engine) + RESOLUTION
    expected = ask(A, "alone")
    first = ask(B, "shared")
    mistaken = ask(A, "shared")
    assert first.gap(expected) > 100 * limit, "the pictures are told apart"
    assert mistaken.num_cached_tokens > first.num_cached_tokens
    assert mistaken.gap(first) <= limit < mistaken.gap(expected) / 100, "A is answered as if it were B"


def test_reuse_of_kv_is_declined_and_encoder_outputs_are_reused(engine: Engine) -> None:
    assert engine.ask_one(Ask([OPEN, B, "x", CLOSE], salt="t")).report["reason"] == "sibling"
    engine.forget()
    engine.call(inside.count_encoder_runs)
    again = engine.ask_one(Ask([OPEN, "other text before it ", B, CLOSE], salt="t"))
    assert again.report["reason"] == "sibling" and again.report["reused_tokens"] == 0
    assert engine.call(inside.count_encoder_runs) == 0
    assert engine.call(inside.num_kv_entries) == 0, "what LMCache has loaded would be taken for computed"
    assert "LMCacheMPConnector in the same engine" in engine.log_text()
