"""Everything that crosses the process border between the scheduler side and the workers, as frozen plain data.

A job is what one worker does in one step for one request or entry. Every rank answers every job of a step in the same
step's output, so a job is done when all ranks have answered.
"""

from dataclasses import dataclass, field

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata, ECConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from vlcache_connector.exec.model import Prompt
from vlcache_connector.types import Extent, Run


@dataclass(frozen=True, slots=True)
class SpanLoad:
    """One span of a reuse job. `reused` runs are absolute positions."""

    offset: int
    length: int
    kv: Extent
    embedding: Extent
    reused: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class ReuseJob:
    """Fill the covered range of one request: load reused tokens, recompute the others."""

    job_id: int
    request_id: str
    prompt: Prompt  # up to the end of the last span, which may be one token behind the covered range
    block_ids: tuple[int, ...]
    spans: tuple[SpanLoad, ...]
    recomputed: tuple[Run, ...]
    owned_blocks: tuple[int, ...]  # blocks of the covered range: what to report when the job fails


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
    """Compute the KV of an image whose embedding is stored, in scratch blocks, and save it. Only in idle steps."""

    job_id: int
    prompt: Prompt  # ends with the image
    block_ids: tuple[int, ...]
    run: Run
    embedding: Extent
    kv: Extent


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """Copy one encoder output between the slab and the engine's encoder cache."""

    job_id: int
    identifier: str
    num_tokens: int
    extent: Extent
    request_id: str
    index: int  # of the media item in its request


@dataclass(slots=True)
class VLCacheMetadata(KVConnectorMetadata):
    """One step's work of the KV connector."""

    reuse: list[ReuseJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    embeddings: list[EmbeddingJob] = field(default_factory=list)  # saves that the encoder connector did not see
    compiles: list[CompileJob] = field(default_factory=list)
    lost_blocks: set[int] = field(default_factory=set)  # promised to the engine, but their job could not be made


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
    unsupported: str | None = None  # the workers cannot drive this model at all

    def merge(self, other: "JobResults") -> None:
        for job_id, count in other.succeeded.items():
            self.succeeded[job_id] = self.succeeded.get(job_id, 0) + count
        self.failed = other.failed | self.failed
        self.unsupported = self.unsupported or other.unsupported


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
