"""State that the KV connector and the encoder connector of one engine share, per process side.

vLLM creates the two connectors separately and hands neither to the other; both know the engine's `instance_id`. The
first to attach creates the session, the last to detach frees it. One process may hold both sides and several engines
in turn.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from vlcache_connector.config import Options
from vlcache_connector.engine import fingerprint
from vlcache_connector.engine.fetches import Fetches
from vlcache_connector.engine.metadata import JobResults
from vlcache_connector.engine.models import family_of
from vlcache_connector.engine.operations import Operations
from vlcache_connector.engine.readers import Readers
from vlcache_connector.engine.tiers import find_slabs, limits_of, lower_tiers, provenance, slab_name
from vlcache_connector.errors import UnsupportedModelError
from vlcache_connector.exec.late import Late
from vlcache_connector.metrics import Counters
from vlcache_connector.plan.costs import Prices
from vlcache_connector.plan.keys import KeySpace
from vlcache_connector.policy import policies_of
from vlcache_connector.policy.layered import Layered
from vlcache_connector.store.eviction.policies import EVICTION_POLICIES
from vlcache_connector.store.extents import aligned
from vlcache_connector.store.host import HostEntry, HostIndex
from vlcache_connector.store.host_bytes import HostBytes
from vlcache_connector.store.slab import EntryLayout, Slab
from vlcache_connector.store.tiered import LowerTiers
from vlcache_connector.store.trace import Trace
from vlcache_connector.types import EntryClass, Reason, Span

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(f"vllm.{__name__}")

_GIB = 1 << 30
P = ParamSpec("P")
S = TypeVar("S", bound="_Side")
T = TypeVar("T")


class _Side(Protocol):
    _session: "SchedulerSession"


class _Registry(Generic[T]):
    """Sessions by engine, counted; `close` ends one that nobody uses any more."""

    def __init__(self, close: Callable[[T], None] = lambda session: None) -> None:
        self._sessions: dict[str, tuple[T, int]] = {}
        self._close = close

    def attach(self, key: str, create: Callable[[], T]) -> T:
        session, count = self._sessions.get(key) or (create(), 0)
        self._sessions[key] = (session, count + 1)
        return session

    def get(self, key: str) -> T | None:
        session, _ = self._sessions.get(key, (None, 0))
        return session

    def detach(self, key: str) -> None:
        session, count = self._sessions.pop(key, (None, 0))
        if session is not None and count > 1:
            self._sessions[key] = (session, count - 1)
        elif session is not None:
            self._close(session)


def locked(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A hook of the scheduler side: nobody else changes the index while it runs."""

    @functools.wraps(method)
    def hook(side: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with side._session.lock:
            return method(side, *args, **kwargs)

    return hook


SCHEDULERS: "_Registry[SchedulerSession]" = _Registry(lambda session: session.close())
WORKERS: "_Registry[WorkerSession]" = _Registry()


@dataclass(slots=True)
class Job:
    """What the scheduler side remembers of a job until all ranks answered."""

    job_id: int
    pinned: list[HostEntry] = field(default_factory=list)  # entries that the job reads
    written: HostEntry | None = None  # the entry that the job writes
    is_read_late: bool = False  # ranks say by themselves when they have read
    on_done: Callable[[str | None], None] | None = None  # called with None, or with why the job failed


class SchedulerSession:
    """The host tier as the scheduler process sees it, and the jobs that are under way."""

    def __init__(self, vllm_config: "VllmConfig", options: Options, layout: EntryLayout) -> None:
        self.options = options
        self.layout = layout
        self.policies = policies_of(options.policy, options.profile)
        layered = self.policies.get(Layered.name)
        if isinstance(layered, Layered) and layout.num_layers:
            layered.check(fingerprint.model_id(vllm_config), layout.num_layers)
        policy, capacity = EVICTION_POLICIES[options.eviction], int(options.host_gib * _GIB)
        self.index = HostIndex(capacity, policy, limits_of(options), self._evicted)
        self.keys = KeySpace(fingerprint.kv_facts(vllm_config, layout), fingerprint.embedding_facts(vllm_config))
        self.counters = Counters()
        self.prices = Prices()
        self.trace = Trace(options.trace_path, capacity) if options.trace_path is not None else None
        self.has_kv = False  # a KV connector is attached
        self.unsupported: str | None = None  # why it reuses nothing
        self.reason = Reason.ENGINE  # the same in a word
        self.wanted_embeddings: dict[bytes, Any] = {}  # key -> media item that the encoder works on in this step
        self.lock = threading.RLock()  # held by every hook of the scheduler side: threads of `lower` change the index
        slabs = find_slabs(vllm_config, options, layout)
        self.host_bytes = HostBytes(slabs, provenance(vllm_config)) if slabs else None
        self.lower: LowerTiers | None = None
        if self.host_bytes is not None:
            moved = self.index, self.lock, self.host_bytes, self.counters
            self.lower = lower_tiers(vllm_config, options, limits_of(options), *moved)
        self.fetches = Fetches(self)
        self.operations = Operations(vllm_config, self, slabs)
        self._num_ranks = vllm_config.parallel_config.tensor_parallel_size
        self._instance = vllm_config.instance_id
        self._jobs: dict[int, Job] = {}
        self._readers = Readers(self.index, self._num_ranks)
        self._next_job = 0

    @property
    def has_late_answers(self) -> bool:
        """Whether ranks owe an answer about memory that is read or written."""
        return len(self._readers) > 0 or any(job.written is not None for job in self._jobs.values())

    @property
    def has_ec_only(self) -> bool:
        """Whether the encoder connector alone is at work."""
        return not self.has_kv or self.unsupported is not None

    def new_job(
        self,
        pinned: list[HostEntry] | None = None,
        written: HostEntry | None = None,
        on_done: Callable[[str | None], None] | None = None,
        is_read_late: bool = False,
    ) -> int:
        """Register a job; pins the entries that it reads until it is answered or, where `is_read_late`, until all ranks
        have released them besides. `written` is pinned already.
        """
        job = Job(self._next_job, pinned or [], written, is_read_late, on_done)
        self._next_job += 1
        self._jobs[job.job_id] = job
        for entry in job.pinned:
            self.index.pin(entry)
        return job.job_id

    def reserve(self, key: bytes, nbytes: int, num_tokens: int, entry_class: EntryClass) -> HostEntry | None:
        """Room for a new entry; None, counted, when there is none."""
        seconds = self.prices.saved_by(entry_class.kind, num_tokens)
        entry = self.index.reserve(key, nbytes, num_tokens, entry_class, seconds)
        if entry is None:
            self.counters.add("dropped_saves", label="no_room")
        elif self.trace is not None:
            self.trace.inserted(key, entry.extent.nbytes, seconds, entry_class)
        return entry

    def is_held(self, key: bytes, num_tokens: int) -> bool:
        """Whether some tier has the entry, or will soon have it."""
        entry = self.index.get(key)
        if entry is not None:
            return entry.num_tokens == num_tokens
        lower = self.lower
        return lower is not None and (lower.fetching(key) is not None or lower.find(key, num_tokens) is not None)

    def orders(self, spans: Sequence[Span]) -> list[Sequence[int]]:
        """Of each span the tokens that stand for all of it; empty where no entry of this process's memory tells."""
        if self.host_bytes is None:
            return [()] * len(spans)
        entries = [self.index.get(span.kv_key) for span in spans]
        return [() if entry is None else self.host_bytes.order(entry) for entry in entries]

    def looked_up(self, key: bytes, nbytes: int, num_tokens: int, entry_class: EntryClass, is_hit: bool) -> None:
        """A request has asked for an entry, for the first time. Only the trace wants to know."""
        if self.trace is not None:
            seconds = self.prices.saved_by(entry_class.kind, num_tokens)
            self.trace.looked_up(key, aligned(nbytes), seconds, entry_class, is_hit)

    def close(self) -> None:
        """The last connector has detached."""
        self.operations.close()
        if self.lower is not None:
            self.lower.close()
        if self.trace is not None:
            self.trace.close()

    def _evicted(self, entry: HostEntry, reason: str) -> None:
        self.counters.add("evictions", label=reason)
        if self.trace is not None:
            self.trace.evicted(entry.key, entry.extent.nbytes, entry.entry_class, reason)

    def take_results(self, results: JobResults) -> None:
        """Learn prices, and settle the jobs that all ranks answered."""
        for kind, num_tokens, seconds in results.laps:
            self.prices.add(kind, num_tokens, seconds)
        self.unsupported = self.unsupported or results.unsupported
        for job_id in self._jobs.keys() & {*results.succeeded, *results.failed}:
            complete = results.succeeded.get(job_id, 0) == self._num_ranks
            error = results.failed.get(job_id, None if complete else "not every rank answered")
            self.settle(job_id, error)
        for job_id, count in results.released.items():
            self._readers.released(job_id, count)

    def hear(self) -> None:
        """Take late answers of a worker in this process that may be given, without waiting for a step. They may come
        before what that worker has said earlier, in a step whose output waits to be looked at.
        """
        worker = WORKERS.get(self._instance)
        results = worker.late.take(waits=False) if worker is not None and worker.late is not None else None
        if results is not None:
            self.take_results(results)

    def settle(self, job_id: int, error: str | None) -> None:
        """End a job: release its pins, publish or drop what it wrote."""
        job = self._jobs.pop(job_id)
        if job.is_read_late:
            self._readers.job_ended(job_id, job.pinned)
        else:
            for entry in job.pinned:
                self.index.unpin(entry)
        if job.written is not None:
            if error is None:
                self.index.commit(job.written)
                if self.lower is not None and self.index.get(job.written.key) is job.written:
                    self.lower.keep(job.written)
            else:
                self.index.discard(job.written)
        if job.on_done is not None:
            job.on_done(error)


class WorkerSession:
    """One worker's slab, and the engine's encoder cache once a hook has shown it."""

    def __init__(self, vllm_config: "VllmConfig", options: Options, layout: EntryLayout) -> None:
        self.options = options
        self._slab_name = slab_name(vllm_config, get_tensor_model_parallel_rank())
        self.slab = Slab(int(options.host_gib * _GIB), layout, self._slab_name)
        self.encoder_cache: dict[str, torch.Tensor] = {}
        self.counters = Counters()
        self.late: Late[JobResults] | None = None

    def adopt(self, options: Options, layout: EntryLayout) -> None:
        """Take the KV connector's options and layout, which are the scheduler side's, before any job has run.

        With an encoder connector of the user's own, that one was created first and knows no KV layout.
        """
        if layout != self.slab.layout or options.host_gib != self.options.host_gib:
            self.slab = Slab(int(options.host_gib * _GIB), layout, self._slab_name)
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
