"""What is declined, on vLLM's own configuration and cache objects; and which engines are accepted at all."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoints import cached_checkpoint
from vlcache_connector.engine.compat import require_supported_engine
from vlcache_connector.engine.fingerprint import are_weights_known, embedding_facts, kv_facts, weights_fingerprint
from vlcache_connector.engine.support import engine_reason, feature_reason, frames_of
from vlcache_connector.errors import UnsupportedEngineError
from vlcache_connector.store.slab import EntryLayout
from vlcache_connector.types import MAX_ORDERED, Reason, Run


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return cached_checkpoint("qwen3_vl", 256, 4, root=Path(".checkpoints"))


@pytest.fixture
def config(checkpoint: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(checkpoint), max_model_len=2048, enforce_eager=True).create_engine_config()


def full_attention(**changes: Any) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(
        **{"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16} | changes
    )


def cache(*specs: Any, hash_block_size: int | None = None) -> Any:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(8, [], groups, hash_block_size=hash_block_size)


def test_a_plain_engine_of_a_known_family_is_accepted(config: Any) -> None:
    assert engine_reason(config, cache(full_attention())) is None
    assert engine_reason(config, cache(full_attention(), hash_block_size=32)) is None


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            config = getattr(config, parent)
        object.__setattr__(config, last, value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("lora_config", SimpleNamespace()), "LoRA"),
        (_set("speculative_config", SimpleNamespace()), "speculative"),
        (_set("parallel_config.pipeline_parallel_size", 2), "pipeline"),
        (_set("parallel_config.prefill_context_parallel_size", 2), "context parallelism"),
        (_set("parallel_config.decode_context_parallel_size", 2), "context parallelism"),
        (_set("cache_config.cache_dtype", "fp8_e5m2"), "fp8_e5m2"),
        (_set("cache_config.kv_sharing_fast_prefill", True), "fast prefill"),
        (_set("model_config.multimodal_config.video_pruning_rate", 0.3), "pruned"),
        (_set("ec_transfer_config", SimpleNamespace(ec_connector="ECExampleConnector")), "ECExampleConnector"),
        (_set("model_config.model_arch_config.architectures", ["Gemma3ForConditionalGeneration"]), "no layer adapter"),
    ],
)
def test_an_engine_with_an_unverified_feature_is_declined(config: Any, change: Any, words: str) -> None:
    change(config)
    reason = engine_reason(config, cache(full_attention()))
    assert reason is not None and words in reason


def test_data_parallel_experts_are_declined_and_dense_data_parallelism_is_not(config: Any) -> None:
    _set("parallel_config.data_parallel_size", 2)(config)
    for is_moe, is_declined in ((True, True), (None, True), (False, False)):
        _set("parallel_config.is_moe_model", is_moe)(config)
        assert (engine_reason(config, cache(full_attention())) is not None) == is_declined


def test_caches_that_are_not_one_group_of_full_attention_are_declined(config: Any) -> None:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    sliding = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=128)
    for unfit in (
        cache(full_attention(), full_attention()),
        cache(full_attention(), sliding),
        cache(sliding),
        cache(full_attention(sliding_window=64)),
        cache(full_attention(attention_chunk_size=64)),
        cache(full_attention(head_size_v=32)),
        cache(full_attention(), hash_block_size=16),
    ):
        assert engine_reason(config, unfit) is not None


def _feature(**changes: Any) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    fields: dict[str, Any] = {
        "data": {"image_grid_thw": object(), "pixel_values": object()},
        "modality": "image",
        "identifier": "0123456789abcdef" * 4,
        "mm_position": PlaceholderRange(3, 4),
    }
    return MultiModalFeatureSpec(**fields | changes)


def test_media_items_are_declined_with_their_reason() -> None:
    from vllm.multimodal.inputs import PlaceholderRange

    sparse = PlaceholderRange(3, 4, is_embed=torch.tensor([True, False, True, True]))
    assert feature_reason(_feature(), False) is None
    assert feature_reason(_feature(modality="audio"), False) is Reason.MODALITY
    assert feature_reason(_feature(data=None), False) is Reason.EMBEDDING_INPUT
    assert feature_reason(_feature(data={"image_embeds": object()}), False) is Reason.EMBEDDING_INPUT
    assert feature_reason(_feature(mm_position=sparse), False) is Reason.SPARSE_PLACEHOLDER
    assert feature_reason(_feature(identifier="3f-image-0"), False) is Reason.CLIENT_UUID
    assert feature_reason(_feature(identifier="3f-image-0"), True) is None


@pytest.mark.parametrize(
    ("is_embed", "frames"),
    [
        ("1111", ()),
        ("0110110", (Run(1, 3), Run(4, 6))),
        ("110011", (Run(0, 2), Run(4, 6))),
        ("011010", None),
        ("0110", None),
        ("01101101100", None),
        ("0000", None),
    ],
    ids=["dense", "text around", "text between", "of two lengths", "too few", "too many", "none"],
)
def test_a_video_is_accepted_when_it_is_one_run_or_a_run_for_each_step(
    is_embed: str, frames: tuple[Run, ...] | None
) -> None:
    from vllm.multimodal.inputs import PlaceholderRange

    mask = torch.tensor([digit == "1" for digit in is_embed])
    data = {"video_grid_thw": SimpleNamespace(data=torch.tensor([2, 4, 2])), "pixel_values_videos": object()}
    video = _feature(modality="video", data=data, mm_position=PlaceholderRange(3, len(mask), is_embed=mask))
    assert frames_of(video) == frames
    assert feature_reason(video, False) is (None if frames is not None else Reason.SPARSE_PLACEHOLDER)


def test_a_video_is_declined_without_its_frames_or_their_hash() -> None:
    video = {"modality": "video", "data": {"video_grid_thw": object(), "pixel_values_videos": object()}}
    embedded = {"video_embeds": object(), "video_grid_thw": object()}
    assert feature_reason(_feature(**video), False) is None
    assert feature_reason(_feature(**video | {"data": embedded}), False) is Reason.EMBEDDING_INPUT
    assert feature_reason(_feature(modality="video"), False) is Reason.EMBEDDING_INPUT, "it has no grid of a video"
    assert feature_reason(_feature(**video, identifier="3f-video-0"), False) is Reason.CLIENT_UUID


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.5", "0.32"])
def test_supported_versions_are_accepted(version: str) -> None:
    require_supported_engine(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.320.0", "1.0.32", "0.3"])
def test_other_versions_are_refused_with_what_works(version: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=r"works with vLLM 0\.32, but vLLM .* is installed\. Install"):
        require_supported_engine(version)


def test_the_fingerprint_changes_with_weights_processor_and_layout(config: Any, tmp_path: Path) -> None:
    layout = EntryLayout(4, 2, 64, torch.bfloat16, 256, torch.bfloat16)
    wider = EntryLayout(4, 2, 64, torch.float16, 256, torch.bfloat16)
    before = kv_facts(config, layout)
    assert before == kv_facts(config, layout) and before != kv_facts(config, wider)
    embedding = embedding_facts(config)
    _set("model_config.multimodal_config.mm_processor_kwargs", {"max_pixels": 10000})(config)
    assert embedding_facts(config) != embedding and kv_facts(config, layout) != before

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    empty = weights_fingerprint(tmp_path)
    weights.write_bytes(bytes(1 << 19) + b"\x01" + bytes((1 << 19) - 1))
    assert weights_fingerprint(tmp_path) != empty
    assert weights_fingerprint(tmp_path / "not there") == weights_fingerprint(tmp_path / "nor there")


def test_the_fingerprint_changes_with_how_much_an_entry_says_of_its_content(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = EntryLayout(4, 2, 64, torch.bfloat16, 256, torch.bfloat16)
    before = kv_facts(config, layout)
    monkeypatch.setattr("vlcache_connector.engine.fingerprint.MAX_ORDERED", MAX_ORDERED + 1)
    assert kv_facts(config, layout) != before


def test_weights_of_a_hub_name_are_known_by_the_commit_only(config: Any) -> None:
    """Entries that outlive the engine must not be found after the name stands for other weights."""
    model = config.model_config
    assert are_weights_known(model)
    model.model = "somebody/some-model"
    assert not are_weights_known(model)
    facts = set()
    for commit in ("1" * 40, "2" * 40):
        model.hf_config._commit_hash = commit
        assert are_weights_known(model)
        facts.add(embedding_facts(config))
    assert len(facts) == 2
