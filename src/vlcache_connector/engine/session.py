"""State that the KV connector and the encoder connector of one engine share, per process side.

vLLM creates the two connectors separately and hands neither to the other; both know the engine's `instance_id`. The
first to attach creates the session, the last to detach frees it. One process may hold both sides and several engines
in turn.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from vllm.logger import init_logger

from vlcache_connector.config import Options
from vlcache_connector.engine import fingerprint
from vlcache_connector.engine.metadata import JobResults
from vlcache_connector.engine.models import family_of
from vlcache_connector.errors import UnsupportedModelError
from vlcache_connector.metrics import Counters
from vlcache_connector.plan.keys import KeySpace
from vlcache_connector.store.eviction import LRU
from vlcache_connector.store.host import HostEntry, HostIndex
from vlcache_connector.store.slab import EntryLayout, Slab

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(f"vllm.{__name__}")

_GIB = 1 << 30
T = TypeVar("T")


class _Registry(Generic[T]):
    """Sessions by engine, counted."""

    def __init__(self) -> None:
        self._sessions: dict[str, tuple[T, int]] = {}

    def attach(self, key: str, create: Callable[[], T]) -> T:
        session, count = self._sessions.get(key) or (create(), 0)
        self._sessions[key] = (session, count + 1)
        return session

    def detach(self, key: str) -> None:
        session, count = self._sessions.pop(key, (None, 0))
        if session is not None and count > 1:
            self._sessions[key] = (session, count - 1)


SCHEDULERS: "_Registry[SchedulerSession]" = _Registry()
WORKERS: "_Registry[WorkerSession]" = _Registry()


@dataclass(slots=True)
class Job:
    """What the scheduler side remembers of a job until all ranks answered."""

    job_id: int
    pinned: list[HostEntry] = field(default_factory=list)  # entries that the job reads
    written: HostEntry | None = None  # the entry that the job writes
    on_done: Callable[[str | None], None] | None = None  # called with None, or with why the job failed


class SchedulerSession:
    """The host tier as the scheduler process sees it, and the jobs that are under way."""

    def __init__(self, vllm_config: "VllmConfig", options: Options, layout: EntryLayout) -> None:
        self.options = options
        self.layout = layout
        self.index = HostIndex(int(options.host_gib * _GIB), LRU())
        self.keys = KeySpace(fingerprint.kv_facts(vllm_config, layout), fingerprint.embedding_facts(vllm_config))
        self.counters = Counters()
        self.unsupported: str | None = None
        self.wanted_embeddings: dict[bytes, Any] = {}  # key -> media item that the encoder works on in this step
        self._num_ranks = vllm_config.parallel_config.tensor_parallel_size
        self._jobs: dict[int, Job] = {}
        self._next_job = 0
        self._evictions_seen = 0

    def new_job(
        self,
        pinned: list[HostEntry] | None = None,
        written: HostEntry | None = None,
        on_done: Callable[[str | None], None] | None = None,
    ) -> int:
        """Register a job; pins the entries that it reads until it is answered. `written` is pinned already."""
        job = Job(self._next_job, pinned or [], written, on_done)
        self._next_job += 1
        self._jobs[job.job_id] = job
        for entry in job.pinned:
            self.index.pin(entry)
        return job.job_id

    def reserve(self, key: bytes, nbytes: int, num_tokens: int) -> HostEntry | None:
        """Room for a new entry; None, counted, when there is none."""
        entry = self.index.reserve(key, nbytes, num_tokens)
        if entry is None:
            self.counters.add("dropped_saves", label="no_room")
        self.counters.add("evictions", self.index.evictions - self._evictions_seen)
        self._evictions_seen = self.index.evictions
        return entry

    def take_results(self, results: JobResults) -> None:
        """Settle the jobs that all ranks answered."""
        self.unsupported = self.unsupported or results.unsupported
        for job_id in {*results.succeeded, *results.failed}:
            complete = results.succeeded.get(job_id, 0) == self._num_ranks
            error = results.failed.get(job_id, None if complete else "not every rank answered")
            self.settle(job_id, error)

    def settle(self, job_id: int, error: str | None) -> None:
        """End a job: release its pins, publish or drop what it wrote."""
        job = self._jobs.pop(job_id)
        for entry in job.pinned:
            self.index.unpin(entry)
        if job.written is not None:
            if error is None:
                self.index.commit(job.written)
            else:
                self.index.discard(job.written)
        if job.on_done is not None:
            job.on_done(error)


class WorkerSession:
    """One worker's slab, and the engine's encoder cache once a hook has shown it."""

    def __init__(self, options: Options, layout: EntryLayout) -> None:
        self.options = options
        self.slab = Slab(int(options.host_gib * _GIB), layout)
        self.encoder_cache: dict[str, torch.Tensor] = {}
        self.counters = Counters()

    def adopt(self, options: Options, layout: EntryLayout) -> None:
        """Take the KV connector's options and layout, which are the scheduler side's, before any job has run.

        With an encoder connector of the user's own, that one was created first and knows no KV layout.
        """
        if layout != self.slab.layout or options.host_gib != self.options.host_gib:
            self.slab = Slab(int(options.host_gib * _GIB), layout)
        self.options = options


def entry_layout(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig | None") -> EntryLayout:
    """Shapes of this engine's entries. Without a KV cache configuration, entries hold embeddings only."""
    model = vllm_config.model_config
    family = family_of(model.architectures)
    width = family.embedding_width(model.hf_config) if family is not None else 0
    layers, heads, dim, dtype = 0, 0, 0, model.dtype
    if kv_cache_config is not None:
        group = kv_cache_config.kv_cache_groups[0]
        spec: Any = group.kv_cache_spec
        layers, heads, dim, dtype = len(group.layer_names), spec.num_kv_heads, spec.head_size, spec.dtype
    return EntryLayout(layers, heads, dim, dtype, width, model.dtype)


def require_family(vllm_config: "VllmConfig") -> None:
    """Raise `UnsupportedModelError` when the encoder output of this model has an unknown shape."""
    architectures = vllm_config.model_config.architectures
    if family_of(architectures) is None:
        raise UnsupportedModelError(f"no adapter for {architectures}; start without VLCacheECConnector")
