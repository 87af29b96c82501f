"""What one rank answers at the end of a step. Worker side."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vlcache_connector.engine.metadata import JobResults, VLCacheMetadata


@dataclass(slots=True)
class StepAnswers:
    """What one rank says at the end of a step."""

    results: JobResults = field(default_factory=JobResults)
    finished: set[str] = field(default_factory=set)  # requests whose reuse is over
    failed: set[str] = field(default_factory=set)  # those of them whose pages are not filled


def answer_all_failed(metadata: VLCacheMetadata, why: str) -> StepAnswers:
    """Answers of a step of which no job was tried."""
    over = [piece for piece in metadata.reuse if piece.is_last]
    jobs: Iterable[Any] = (*over, *metadata.saves, *metadata.embeddings, *metadata.compiles, *metadata.audits)
    released = dict.fromkeys((piece.job_id for piece in over), 1)
    results = JobResults(failed={job.job_id: why for job in jobs}, released=released, unsupported=why)
    requests = {piece.request_id for piece in over}
    return StepAnswers(results, requests, set(requests))
