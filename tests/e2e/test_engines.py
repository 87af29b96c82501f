"""Other ways to start an engine: plain vLLM, the encoder connector alone, and an engine that is declined as a whole."""

import pytest

from e2e import inside
from e2e.conftest import Start
from e2e.engine import Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, SCENES, A


@pytest.fixture(scope="module")
def plain_engine(start_engine: Start) -> Engine:
    """vLLM without any connector."""
    return start_engine("plain", "qwen2_5_vl", "float32", None)


def test_mode_off_equals_an_engine_without_the_connector(plain_engine: Engine, start_engine: Start) -> None:
    ours = start_engine("declined", "qwen2_5_vl", "float32", {"host_gib": 0.03})
    for parts in SCENES.values():
        expected = plain_engine.ask_one(Ask(parts, "off"))
        found = ours.ask_one(Ask(parts, "off"))
        assert found.token_ids == expected.token_ids and found.logprobs == expected.logprobs
        assert found.num_cached_tokens == expected.num_cached_tokens


def test_the_encoder_connector_works_alone(plain_engine: Engine, start_engine: Start) -> None:
    config = {
        "ec_connector": "VLCacheECConnector",
        "ec_connector_module_path": "vlcache_connector",
        "ec_role": "ec_both",
        "ec_connector_extra_config": {"host_gib": 0.03},
    }
    engine = start_engine("encoder", "qwen2_5_vl", "float32", None, ec_transfer_config=config)
    engine.call(inside.count_encoder_runs)
    first = engine.ask_one(Ask([OPEN, A, CLOSE]))
    assert engine.call(inside.count_encoder_runs) == 1
    plain_engine.forget()
    assert first.logprobs == plain_engine.ask_one(Ask([OPEN, A, CLOSE], "off")).logprobs

    engine.forget()
    prompt = [OPEN, LONG, A, "again?", CLOSE]
    second = engine.ask_one(Ask(prompt))
    assert engine.call(inside.count_encoder_runs) == 0
    plain_engine.forget()
    assert second.logprobs == plain_engine.ask_one(Ask(prompt, "off")).logprobs

    engine.call(inside.plant, "vlcache_connector.engine.ec_sides:ECWorker", "_load")
    engine.forget()
    assert engine.ask_one(Ask(prompt)).logprobs == second.logprobs
    assert engine.call(inside.count_encoder_runs) == 1


def test_an_engine_that_cannot_reuse_runs_as_plain_vllm_and_says_why(start_engine: Start) -> None:
    engine = start_engine("fp8", "qwen2_5_vl", "bfloat16", {}, kv_cache_dtype="fp8")
    engine.ask_one(Ask([OPEN, A, CLOSE]))
    engine.forget()
    report = engine.ask_one(Ask([OPEN, LONG, A, CLOSE])).report
    assert report["reason"] == "engine" and report["reused_tokens"] == 0
    assert "the KV cache is quantised (fp8)" in engine.log_text()
