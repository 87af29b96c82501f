"""Beside other connectors in one engine, on vLLM's own `MultiConnector` and its own keys."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.fake_config import Size, configure
from engine.fake_prompts import Ask, request_of, truth_of
from engine.scenes import PROMPT
from vlcache_connector.engine import namespace
from vlcache_connector.engine.session import SCHEDULERS
from vlcache_connector.engine.siblings import outer_config, sibling_reason

OURS = {"kv_connector": "VLCacheConnector", "kv_connector_module_path": "vlcache_connector", "kv_role": "kv_both"}


def beside(base: Any, *others: dict[str, Any]) -> Any:
    """A configuration of vLLM's `MultiConnector`, ours first."""
    from vllm.config import KVTransferConfig

    config = configure(base, Size(), {})
    options = config.kv_transfer_config.kv_connector_extra_config
    children = [OURS | {"kv_connector_extra_config": options}, *others]
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config={"connectors": children}
    )
    return config


def named(name: str, **extra: Any) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


@pytest.mark.parametrize(
    "name", ["LMCacheMPConnector", "LMCacheConnectorV1", "OffloadingConnector", "NixlConnector", "SomebodysConnector"]
)
def test_reuse_is_declined_beside_whatever_may_mix_approximate_and_exact_blocks(base_config: Any, name: str) -> None:
    reason = sibling_reason(beside(base_config, named(name)))
    assert reason is not None and name in reason


def test_reuse_goes_on_alone_and_beside_what_takes_the_hash_of_the_block(base_config: Any) -> None:
    assert sibling_reason(configure(base_config, Size(), {})) is None
    assert sibling_reason(beside(base_config)) is None
    assert sibling_reason(beside(base_config, named("SimpleCPUOffloadConnector"))) is None
    config = copy.copy(base_config)
    config.kv_transfer_config = None  # the encoder connector alone
    assert sibling_reason(config) is None


@pytest.fixture
def cache() -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    return KVCacheConfig(200, [], [KVCacheGroupSpec(["layer"], spec)])


@pytest.fixture
def multi(
    base_config: Any, cache: Any, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """Scheduler side of a real `MultiConnector` of ours and vLLM's example connector, which keys by token ids."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    config = beside(base_config, named("ExampleConnector", shared_storage_path=str(tmp_path)))
    config.scheduler_config.disable_hybrid_kv_cache_manager = True  # as vLLM sets it beside such a connector
    connector = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, cache)
    yield connector
    connector.shutdown()


def test_a_request_beside_a_sibling_is_computed_and_says_why(multi: Any) -> None:
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    ask = Ask(PROMPT)
    request = request_of(ask, truth_of("one", ask), get_request_block_hasher(4, sha256))
    before = list(request.block_hashes)
    multi.on_new_request(request)
    assert multi.get_num_new_matched_tokens(request, 0) == (0, False)
    ours = multi.sub_connectors[0]
    ours._scheduler.update_state_after_alloc(request, [], 0)
    report = ours._scheduler.request_finished(request)["vlcache"]
    assert report["reason"] == "sibling" and list(request.block_hashes) == before
    assert ours._reason is not None and "ExampleConnector" in ours._reason


def test_one_flag_still_sets_up_both_connectors_and_the_way_out_of_failed_loads(multi: Any) -> None:
    """`MultiConnector` gives its children copies; what is set there, nobody sees."""
    engine = multi._vllm_config
    assert engine.ec_transfer_config.ec_connector == "VLCacheECConnector"
    assert "host_gib" in engine.ec_transfer_config.ec_connector_extra_config
    assert engine.kv_transfer_config.kv_load_failure_policy == "recompute"
    assert SCHEDULERS._sessions[engine.instance_id][0].has_ec_only


def test_numbers_of_ours_arrive_in_an_api_server(multi: Any) -> None:
    """As plain data from the engine's process, for which `MultiConnector` finds our class by its name alone."""
    stats = type(multi).build_kv_connector_stats({"VLCacheConnector": {"hits": 2.0}})
    assert stats["VLCacheConnector"].data == {"hits": 2.0}


def test_alone_the_configuration_is_the_engine_s_own(base_config: Any) -> None:
    assert outer_config(base_config) is base_config


def test_vllms_offloading_connector_keeps_hashes_that_a_request_had_before(base_config: Any) -> None:
    """Why it is not among those that reuse goes on beside. If this fails, look again at `siblings.KEYED_BY_BLOCK`."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import RequestOffloadState
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    ask = Ask(PROMPT)
    request = request_of(ask, truth_of("one", ask), get_request_block_hasher(4, sha256))
    group = SimpleNamespace(hashes_per_chunk=1, group_idx=0, tokens_per_chunk=4)
    context: Any = SimpleNamespace(set_offload_key_position=lambda key, position: None)
    config: Any = SimpleNamespace(kv_group_configs=(group,))
    state = RequestOffloadState(config, request, context, context)
    state.update_offload_keys()
    (exact,) = (list(each.offload_keys) for each in state.group_states)
    assert namespace.enter(request, 2, "leading", 0.05) is not None
    state.update_offload_keys()
    assert state.group_states[0].offload_keys == exact, "approximate blocks would be kept under these"
