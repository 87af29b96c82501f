"""What the connector declines: for the whole engine, for one request, for one media item.

A declined request runs as plain vLLM. The rule is to decline whatever was not verified, never to guess.
"""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vlcache_connector.engine.encoder_flag import encoder_reason
from vlcache_connector.engine.models import FAMILIES
from vlcache_connector.plan.keys import is_content_hash
from vlcache_connector.types import MODALITIES, Reason, Run

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

SWITCHED_OFF = 'the option "mode" is "off"'


def engine_reason(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> str | None:
    """Why this engine's requests cannot reuse KV, as a sentence for the log; None when they can."""
    parallel = vllm_config.parallel_config
    architectures = vllm_config.model_config.architectures
    dtype = str(vllm_config.cache_config.cache_dtype)
    checks = (
        (_family_missing(architectures), f"no layer adapter for {architectures}; known are {sorted(FAMILIES)}"),
        (vllm_config.lora_config is not None, "LoRA is enabled"),
        (vllm_config.speculative_config is not None, "speculative decoding is enabled"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is enabled"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism is enabled"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism is enabled"),
        (parallel.data_parallel_size > 1 and parallel.is_moe_model is not False, "data-parallel mixture of experts"),
        (vllm_config.cache_config.kv_sharing_fast_prefill, "KV-sharing fast prefill is enabled"),
        (dtype.startswith(("fp8", "int8", "int4", "nvfp4", "turboquant")), f"the KV cache is quantised ({dtype})"),
    )
    for applies, sentence in checks:
        if applies:
            return sentence
    return encoder_reason(vllm_config) or _cache_reason(kv_cache_config)


def _family_missing(architectures: list[str]) -> bool:
    return not any(name in FAMILIES for name in architectures)


def _cache_reason(kv_cache_config: "KVCacheConfig") -> str | None:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups (hybrid or sliding-window layers)"
    spec = groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec:
        return f"the KV cache is of kind {type(spec).__name__}, not full attention"
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        return "attention has a sliding window or chunks"
    if spec.head_size != spec.head_size_v:
        return "keys and values differ in size"
    hash_block_size = kv_cache_config.hash_block_size
    if hash_block_size is not None and hash_block_size != spec.block_size:
        return f"prefix-cache hashes cover {hash_block_size} tokens, but blocks hold {spec.block_size}"
    return None


def warn_of_embedding_inputs(vllm_config: "VllmConfig") -> None:
    """vLLM lets clients of a KV consumer send embeddings in place of media; its own advice is to trust such clients."""
    multimodal, transfer = vllm_config.model_config.multimodal_config, vllm_config.kv_transfer_config
    if transfer is not None and transfer.is_kv_consumer and multimodal is not None and multimodal.enable_mm_embeds:
        logger.warning(
            "VLCache: with kv_role %s, vLLM accepts pre-computed embedding inputs from clients. Where clients are not "
            'trusted, set "kv_role": "kv_producer" instead; reuse works the same and such inputs stay refused.',
            transfer.kv_role,
        )


def request_reason(request: "Request") -> Reason | None:
    """Why nothing of this request is reused or saved; None when it may be."""
    if request.lora_request is not None:
        return Reason.LORA
    if request.pooling_params is not None:
        return Reason.POOLING
    if request.prompt_embeds is not None or request.prompt_token_ids is None or request.prompt_is_token_ids is not None:
        return Reason.PROMPT_EMBEDS
    if request.resumable:
        return Reason.STREAMING_INPUT
    if request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None:
        return Reason.PROMPT_LOGPROBS
    if request.skip_reading_prefix_cache:
        return Reason.MODE
    return None


def feature_reason(feature: "MultiModalFeatureSpec", trust_client_uuids: bool) -> Reason | None:
    """Why this media item cannot be a span; None when it can."""
    data: Any = feature.data
    if feature.modality not in MODALITIES:
        return Reason.MODALITY
    if data is None or f"{feature.modality}_embeds" in data or f"{feature.modality}_grid_thw" not in data:
        return Reason.EMBEDDING_INPUT
    if frames_of(feature) is None:
        return Reason.SPARSE_PLACEHOLDER
    if not trust_client_uuids and not is_content_hash(feature.identifier):
        return Reason.CLIENT_UUID
    return None


def frames_of(feature: "MultiModalFeatureSpec") -> tuple[Run, ...] | None:
    """Which tokens of a media item have encoder output, counted from its first one: empty where all of them have; of a
    video with text between its frames, as Qwen3-VL writes it, one run for each step in time, all of one length. None
    where they lie in another way.
    """
    place, data = feature.mm_position, feature.data
    if place.get_num_embeds() == place.length:
        return ()
    if feature.modality != "video" or data is None:
        return None
    runs = tuple(Run(first - place.offset, last + 1 - place.offset) for first, last in place.extract_embeds_range())
    (num_steps, *_) = data["video_grid_thw"].data.tolist()
    return runs if len(runs) == num_steps and len({len(run) for run in runs}) == 1 else None
