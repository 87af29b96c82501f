"""Other ways to start an engine: plain vLLM, the encoder connector alone, and an engine that is declined as a whole."""

import importlib.util

import pytest

from e2e import inside
from e2e.conftest import Start
from e2e.engine import CONNECTOR, Ask, Engine
from e2e.test_reuse import CLOSE, LONG, OPEN, RESOLUTION, SCENES, A, noise_of, show_pictures


@pytest.fixture(scope="module")
def plain_engine(start_here: Start) -> Engine:
    """vLLM without any connector."""
    return start_here("plain", "qwen2_5_vl", "float32", None)


@pytest.fixture(scope="module")
def full_engine(start_here: Start) -> Engine:
    """Policy `full`, and the role under which vLLM keeps embedding inputs refused."""
    extra = {"host_gib": 0.03, "policy": "full"}
    config = CONNECTOR | {"kv_role": "kv_producer", "kv_connector_extra_config": extra}
    return start_here("full", "qwen2_5_vl", "float32", None, kv_transfer_config=config)


def test_mode_off_equals_an_engine_without_the_connector(plain_engine: Engine, full_engine: Engine) -> None:
    for parts in SCENES.values():
        expected = plain_engine.ask_one(Ask(parts, "off"))
        found = full_engine.ask_one(Ask(parts, "off"))
        assert found.token_ids == expected.token_ids and found.logprobs == expected.logprobs
        assert found.num_cached_tokens == expected.num_cached_tokens


def test_policy_full_equals_an_engine_without_the_connector(plain_engine: Engine, full_engine: Engine) -> None:
    limit = 2 * noise_of(plain_engine) + RESOLUTION
    show_pictures(full_engine)
    for parts in SCENES.values():
        plain_engine.forget()
        full_engine.forget()
        answer = full_engine.ask_one(Ask(parts))
        assert answer.report["recomputed_tokens"] > 0 and not answer.report["approximate"]
        assert answer.gap(plain_engine.ask_one(Ask(parts, "off"))) <= limit


def test_the_producer_role_keeps_embedding_inputs_refused(full_engine: Engine) -> None:
    assert not full_engine.call(inside.accepts_embedding_inputs)


def test_the_encoder_connector_works_alone(plain_engine: Engine, start_once: Start) -> None:
    config = {
        "ec_connector": "VLCacheECConnector",
        "ec_connector_module_path": "vlcache_connector",
        "ec_role": "ec_both",
        "ec_connector_extra_config": {"host_gib": 0.03},
    }
    engine = start_once("encoder", "qwen2_5_vl", "float32", None, ec_transfer_config=config)
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


def test_both_flags_together_store_kv_where_the_scheduler_thinks_it_is(start_once: Start) -> None:
    """The user's encoder connector is created first, without knowing any KV layout and with another size."""
    config = {
        "ec_connector": "VLCacheECConnector",
        "ec_connector_module_path": "vlcache_connector",
        "ec_role": "ec_both",
        "ec_connector_extra_config": {"host_gib": 0.001},
    }
    engine = start_once("both", "qwen2_5_vl", "float32", {"host_gib": 0.03}, ec_transfer_config=config)
    prompt = [OPEN, "first seen here ", A, CLOSE]
    expected = engine.ask_one(Ask(prompt))
    engine.forget()
    # The same text stands before the picture, so its entry is exact here: reusing all of it changes nothing.
    answer = engine.ask_one(Ask(prompt, ratio=0.0))
    assert answer.report["reused_tokens"] == 100
    assert answer.gap(expected) <= 2 * noise_of(engine) + RESOLUTION


LAYERS = 4


@pytest.mark.parametrize("attention", ["auto", "vlcache", "engine"])
def test_passes_with_either_attention_equal_plain_vllm(start_once: Start, attention: str) -> None:
    """Option `attention`: recompute passes use `sparse_query_attention` or the engine's, its forward always its own. By
    default scattered tokens use ours, and what is recomputed in one run the engine's.
    """
    engine = start_once(attention, "qwen2_5_vl", "float32", {"host_gib": 0.03, "attention": attention})
    limit = 2 * noise_of(engine) + RESOLUTION
    show_pictures(engine)
    engine.call(inside.count_calls, "vlcache_connector.exec.attention", "sparse_query_attention")
    for parts in SCENES.values():
        engine.forget()
        expected = engine.ask_one(Ask(parts, "off"))
        engine.forget()
        assert engine.call(inside.num_calls) == 0, "the engine's own forward uses its own attention"
        answer = engine.ask_one(Ask(parts, ratio=1.0))
        assert answer.report["recomputed_tokens"] > 0 and answer.gap(expected) <= limit
        assert (engine.call(inside.num_calls) > 0) == (attention == "vlcache")
        if engine.ask_one(Ask(parts, ratio=0.3, policy="shifted")).report["reused_tokens"]:
            assert engine.call(inside.num_calls) == (0 if attention == "engine" else LAYERS - 1), "the last needs none"


def test_an_attention_that_is_not_installed_stops_the_engine_with_advice(start_once: Start) -> None:
    if importlib.util.find_spec("xformers") is not None:
        pytest.skip("needs an environment without xformers")
    with pytest.raises(
        RuntimeError, match=r"option 'attention' is 'xformers', which cannot run here.*choose 'vlcache'"
    ):
        start_once("xformers", "qwen2_5_vl", "float32", {"attention": "xformers"})


def test_an_engine_that_cannot_reuse_runs_as_plain_vllm_and_says_why(start_once: Start) -> None:
    engine = start_once("fp8", "qwen2_5_vl", "bfloat16", {}, kv_cache_dtype="fp8")
    engine.ask_one(Ask([OPEN, A, CLOSE]))
    engine.forget()
    report = engine.ask_one(Ask([OPEN, LONG, A, CLOSE])).report
    assert report["reason"] == "engine" and report["reused_tokens"] == 0
    assert "the KV cache is quantised (fp8)" in engine.log_text()
