"""The queue of admitted reuse: which pieces of which requests the workers carry out in a step. Scheduler side.

vLLM waits for such a request as for any asynchronous load: its blocks are not shared with others, and it takes no part
in a forward, until every rank has said that the last piece is done. So a load that fails is never read by anyone, and
the request starts again as if the connector had found nothing.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlcache_connector.engine.debug import LoadRecord
from vlcache_connector.engine.metadata import ReusePiece, SpanLoad
from vlcache_connector.engine.session import SchedulerSession
from vlcache_connector.exec.model import Prompt
from vlcache_connector.plan.pieces import next_piece
from vlcache_connector.store.host import HostEntry
from vlcache_connector.types import ReusePlan, Run, SpanPlan


@dataclass(slots=True)
class _Load:
    job_id: int
    request_id: str
    prompt: Prompt
    block_ids: tuple[int, ...]
    plan: ReusePlan
    entries: tuple[tuple[HostEntry, HostEntry], ...]  # KV and embedding of each span of the plan
    position: int
    record: LoadRecord
    question: Run | None = None
    error: str | None = None  # why there is nothing left to do but to report


class LoadQueue:
    """Loads in the order of admission."""

    def __init__(self, session: SchedulerSession, max_step_tokens: int) -> None:
        self._session = session
        self._max_step_tokens = max_step_tokens
        self._loads: OrderedDict[str, _Load] = OrderedDict()
        self._open = 0

    @property
    def num_open(self) -> int:
        """Loads whose end the workers have not reported."""
        return self._open

    def add(
        self,
        request_id: str,
        prompt: Prompt,
        block_ids: Sequence[int],
        plan: ReusePlan,
        on_done: Callable[[str | None], None],
        question: Run | None = None,
    ) -> LoadRecord:
        """Queue an admitted request. `on_done` is called with None or an error when all ranks have reported; never if
        this raises.
        """
        entries = []
        for part in plan.spans:
            kv = self._session.index.get_found(part.span.kv_key)
            embedding = self._session.index.get_found(part.span.embedding_key)
            if kv is None or embedding is None:  # cleared by an operator
                return self.add_failed(request_id, "an entry was cleared between look-up and admission", on_done)
            entries.append((kv, embedding))
        job_id, record = self._new_job([entry for pair in entries for entry in pair], on_done)
        self._loads[request_id] = _Load(
            job_id, request_id, prompt, tuple(block_ids), plan, tuple(entries), plan.start, record, question
        )
        return record

    def add_failed(self, request_id: str, error: str, on_done: Callable[[str | None], None]) -> LoadRecord:
        """The engine waits for a load that cannot be made: let the workers report that. If one is queued already, it
        goes no further, and its own `on_done` is called.
        """
        if (load := self._loads.get(request_id)) is not None:
            load.error = error
            return load.record
        plan = ReusePlan(0, 0, (), ())
        job_id, record = self._new_job([], on_done)
        self._loads[request_id] = _Load(job_id, request_id, Prompt((), ()), (), plan, (), 0, record, error=error)
        return record

    def cancel(self, request_id: str) -> None:
        """The request is gone. The engine keeps its blocks until the workers report the end."""
        load = self._loads.get(request_id)
        if load is not None:
            load.error = "the request was aborted"

    def take(self, num_scheduled_tokens: int) -> list[ReusePiece]:
        """Pieces for the step that is being scheduled.

        Together with the engine's own tokens they stay within what the engine batches at most; when that is used up,
        loads go on with an eighth of it, so that a busy engine does not starve them. Only the first piece may be
        larger, when it is a span that must stay whole.
        """
        budget: float = max(self._max_step_tokens - num_scheduled_tokens, self._max_step_tokens // 8, 1)
        pieces: list[ReusePiece] = []
        for load in list(self._loads.values()):
            if load.error is None and budget < 1:
                continue  # reports of failures cost nothing and go on
            covered, cost = Run(load.position, load.position), 0.0
            if load.error is None:
                covered, cost = next_piece(load.plan, load.position, budget)
                if cost > budget and any(piece.error is None for piece in pieces):
                    continue  # a span that must stay whole: it comes first in a later step
            budget -= cost
            load.position = covered.end
            load.record.num_pieces += 1
            is_last = load.error is not None or covered.end == load.plan.end
            if is_last:
                del self._loads[load.request_id]
            pieces.append(_piece(load, covered, is_last))
        return pieces

    def _new_job(self, pinned: list[HostEntry], on_done: Callable[[str | None], None]) -> tuple[int, LoadRecord]:
        record = LoadRecord(time.monotonic())

        def done(error: str | None) -> None:
            self._open -= 1
            record.ended_s, record.error = time.monotonic(), error
            on_done(error)

        job_id = self._session.new_job(pinned=pinned, on_done=done, is_read_late=True)
        self._open += 1
        return job_id, record


def _piece(load: _Load, covered: Run, is_last: bool) -> ReusePiece:
    plan, recomputed = load.plan, _within(load.plan.recomputed, covered)
    touched = [pair for pair in zip(plan.spans, load.entries, strict=True) if _touches(pair[0], covered)]
    num_dropped = sum(part.num_dropped(plan.num_layers) for part, _ in touched)
    return ReusePiece(
        load.job_id,
        load.request_id,
        load.prompt,
        load.block_ids,
        tuple(_span_load(part, entries, covered) for part, entries in touched),
        recomputed,
        is_last,
        load.error,
        plan.shifts,
        plan.measure,
        load.question,
        round(sum(map(len, recomputed)) - num_dropped),
    )


def _span_load(part: SpanPlan, entries: tuple[HostEntry, HostEntry], covered: Run) -> SpanLoad:
    (kv, embedding), span, reused = entries, part.span, _within(part.reused, covered)
    return SpanLoad(span.offset, span.length, kv.extent, embedding.extent, reused, part.narrowings)


def _touches(part: SpanPlan, covered: Run) -> bool:
    return len(part.span.run.intersect(covered)) > 0


def _within(runs: Sequence[Run], covered: Run) -> tuple[Run, ...]:
    return tuple(common for common in (run.intersect(covered) for run in runs) if len(common))
