"""Everything that crosses the process border between the scheduler side and the workers, as frozen plain data.

A job is what the workers do for one request or entry. Every rank answers it in the same step's output: with the last
piece of a reuse job, in its only step for all others, or in the step after that where a GPU's copies go on (see
`exec.late`). A job is done when all ranks have answered.
"""

from dataclasses import dataclass, field

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata, ECConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from vlcache_connector.exec.audit import Drift
from vlcache_connector.exec.model import Prompt
from vlcache_connector.types import Extent, Measure, Narrowing, Run


@dataclass(frozen=True, slots=True)
class SpanLoad:
    """One span of a piece of reuse. Runs are absolute positions."""

    offset: int
    length: int
    kv: Extent
    embedding: Extent
    reused: tuple[Run, ...]
    narrowings: tuple[Narrowing, ...] = ()

    @property
    def run(self) -> Run:
        return Run(self.offset, self.offset + self.length)


@dataclass(frozen=True, slots=True)
class ReusePiece:
    """Fill a part of the covered range of one request: load reused tokens, recompute the others.

    A job is one or more pieces, in consecutive or later steps; it is answered with the last one.
    """

    job_id: int
    request_id: str
    prompt: Prompt  # up to the end of the last span of the job, which may be one token behind the covered range
    block_ids: tuple[int, ...]
    spans: tuple[SpanLoad, ...]
    recomputed: tuple[Run, ...]
    is_last: bool
    error: str | None = None  # there is nothing to do: the job failed, or its request is gone
    shifts: bool = False  # reused tokens follow the change of the recomputed ones of their span
    measure: Measure | None = None  # by which the pass narrows spans
    question: Run | None = None  # whose tokens are looked from
    num_recomputed: int = 0  # tokens; one that is recomputed in half of the layers counts as half


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Copy one exactly computed span from the pages into the slab, after this step's forward."""

    job_id: int
    request_id: str
    prompt: Prompt
    block_ids: tuple[int, ...]
    run: Run
    kv: Extent


@dataclass(frozen=True, slots=True)
class CompileJob:
    """Compute the KV of a media item whose embedding is stored, in scratch blocks, and save it. Only in idle steps."""

    job_id: int
    prompt: Prompt  # ends with the item
    block_ids: tuple[int, ...]
    run: Run
    embedding: Extent
    kv: Extent


@dataclass(frozen=True, slots=True)
class AuditJob:
    """Compute a prompt with reuse and without, in scratch blocks, and compare. Only in idle steps."""

    piece: ReusePiece  # covers the whole prompt; its request is nobody's
    embeddings: tuple[tuple[int, Extent], ...]  # offset and encoder output of media that are not reused
    request_id: str  # whose prompt this was

    @property
    def job_id(self) -> int:
        return self.piece.job_id


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """Copy one encoder output between the slab and the engine's encoder cache."""

    job_id: int
    identifier: str
    num_tokens: int  # rows
    extent: Extent
    request_id: str
    index: int  # of the media item in its request


@dataclass(slots=True)
class VLCacheMetadata(KVConnectorMetadata):
    """One step's work of the KV connector."""

    num_computed_tokens: int = 0  # by the engine's forward of this step
    reuse: list[ReusePiece] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    embeddings: list[EmbeddingJob] = field(default_factory=list)  # saves that the encoder connector did not see
    compiles: list[CompileJob] = field(default_factory=list)
    audits: list[AuditJob] = field(default_factory=list)


@dataclass(slots=True)
class VLCacheECMetadata(ECConnectorMetadata):
    """One step's work of the encoder connector."""

    loads: list[EmbeddingJob] = field(default_factory=list)
    saves: list[EmbeddingJob] = field(default_factory=list)


@dataclass(slots=True)
class JobResults:
    """Answers of one or more ranks."""

    succeeded: dict[int, int] = field(default_factory=dict)  # job -> number of ranks
    failed: dict[int, str] = field(default_factory=dict)  # job -> why, on the first rank that failed
    released: dict[int, int] = field(default_factory=dict)  # load -> number of ranks that have read its entries
    unsupported: str | None = None  # the workers cannot drive this model at all
    laps: list[tuple[str, int, float]] = field(default_factory=list)  # kind of work, tokens, seconds
    drifts: dict[int, Drift] = field(default_factory=dict)  # of audits that succeeded

    def __bool__(self) -> bool:
        return bool(self.succeeded or self.failed or self.released or self.laps)

    def merge(self, other: "JobResults") -> None:
        for mine, others in ((self.succeeded, other.succeeded), (self.released, other.released)):
            for job_id, count in others.items():
                mine[job_id] = mine.get(job_id, 0) + count
        self.failed = other.failed | self.failed
        self.unsupported = self.unsupported or other.unsupported
        self.laps += other.laps
        for job_id, drift in other.drifts.items():
            self.drifts[job_id] = self.drifts[job_id].merged(drift) if job_id in self.drifts else drift


@dataclass(slots=True)
class VLCacheWorkerMetadata(KVConnectorWorkerMetadata):
    results: JobResults

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, VLCacheWorkerMetadata)
        self.results.merge(other.results)
        return self


@dataclass(slots=True)
class VLCacheECWorkerMetadata(ECConnectorWorkerMetadata):
    results: JobResults

    def aggregate(self, other: ECConnectorWorkerMetadata) -> ECConnectorWorkerMetadata:
        assert isinstance(other, VLCacheECWorkerMetadata)
        self.results.merge(other.results)
        return self
