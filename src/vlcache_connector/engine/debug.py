"""Lines at debug level: one for each finished request, and one for each step's work before the workers start it.

A crash then leaves behind what was about to be launched. Nothing is formatted unless somebody listens.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vlcache_connector.engine.metadata import ReusePiece, VLCacheMetadata
from vlcache_connector.types import Run

if TYPE_CHECKING:
    from vlcache_connector.engine.requests import RequestState

logger = init_logger(f"vllm.{__name__}")


@dataclass(slots=True)
class LoadRecord:
    """How one load goes: from its admission until all ranks have reported."""

    started_s: float
    ended_s: float | None = None
    num_pieces: int = 0
    error: str | None = None

    def __str__(self) -> str:
        if self.ended_s is None:
            return f"unfinished pieces={self.num_pieces}"
        outcome = "done" if self.error is None else f"failed({self.error})"
        return f"{outcome} pieces={self.num_pieces} waited_ms={1e3 * (self.ended_s - self.started_s):.1f}"


def finished(state: "RequestState") -> None:
    """Scheduler side: a request is over, also when it was aborted."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("VLCache: request %s is over: %s", state.request.request_id, " ".join(_words(state)))


def launching(metadata: VLCacheMetadata) -> None:
    """Worker side: these jobs come next."""
    if logger.isEnabledFor(logging.DEBUG):
        jobs = [*map(_piece, metadata.reuse)]
        jobs += [f"save {job.job_id} of {job.request_id} {_run(job.run)}" for job in metadata.saves]
        jobs += [f"embedding {job.job_id} of {job.request_id} x{job.num_tokens}" for job in metadata.embeddings]
        jobs += [f"compile {job.job_id} {_run(job.run)} into {len(job.block_ids)} blocks" for job in metadata.compiles]
        jobs += [f"audit {job.job_id} of {job.request_id}: {_piece(job.piece)}" for job in metadata.audits]
        if jobs:
            logger.debug("VLCache: launching %s", "; ".join(jobs))


def _words(state: "RequestState") -> Iterator[str]:
    report = state.report()
    yield f"mode={report['mode']} ratio={state.options.recompute_ratio} prompt={state.request.num_prompt_tokens}"
    yield from (f"{kind}={report[f'{kind}_tokens']}" for kind in ("prefix_cached", "reused", "recomputed", "computed"))
    yield f"spans={len(state.spans)} known={sum(state.available)} tier={report['tier']} reason={report.get('reason')}"
    yield f"approximate={report['approximate']} load={state.load or 'none'}"
    if state.error is not None:
        yield f"error={state.error}"


def _piece(piece: ReusePiece) -> str:
    what = f"reuse {piece.job_id} of {piece.request_id}"
    if piece.error is not None:
        return f"{what}: nothing, {piece.error}"
    loaded = ",".join(f"{span.offset}:" + "+".join(map(_run, span.reused)) for span in piece.spans)
    recomputed = "+".join(map(_run, piece.recomputed))
    end = ", the last piece" if piece.is_last else ""
    return f"{what}: load {loaded or 'nothing'}, recompute {recomputed or 'nothing'}{end}"


def _run(run: Run) -> str:
    return f"{run.start}-{run.end}"
