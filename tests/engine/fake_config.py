"""Configurations of fake engines: one that vLLM made, with what a test wants to be different."""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

from vllm.config import KVTransferConfig

BLOCK_SIZE = 4
_instances = itertools.count()


@dataclass(frozen=True, slots=True)
class Size:
    """Of an engine."""

    is_async: bool = False
    is_late: bool = False  # copies end in the step after the one that began them, as on a GPU
    num_ranks: int = 1
    num_blocks: int = 200
    max_batched_tokens: int = 64
    max_requests: int = 16
    encoder_tokens: int = 1000
    host_nbytes: int = 1 << 20
    role: str = "kv_both"
    keeps_pixels: bool = False  # True: as if vLLM did not drop those of images that are covered on admission


def configure(base: Any, size: Size, options: dict[str, Any]) -> Any:
    config = copy.copy(base)
    for name in ("scheduler_config", "cache_config", "parallel_config"):
        setattr(config, name, copy.copy(getattr(base, name)))
    config.instance_id = f"fake-{next(_instances)}"
    config.ec_transfer_config = None
    extra = {"host_gib": size.host_nbytes / (1 << 30), "min_reuse_tokens": 4} | options
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="VLCacheConnector",
        kv_connector_module_path="vlcache_connector",
        kv_role=size.role,
        kv_connector_extra_config=extra,
    )
    scheduler, cache = config.scheduler_config, config.cache_config
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs = size.max_batched_tokens, size.max_requests
    scheduler.async_scheduling = size.is_async
    cache.block_size, cache.num_gpu_blocks, cache.enable_prefix_caching = BLOCK_SIZE, size.num_blocks, True
    config.parallel_config.tensor_parallel_size = size.num_ranks
    return config
