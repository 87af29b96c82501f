"""Auditors of the worker side: they look at every entry that is written or read, and at the pages behind a reuse job.

What they find goes to the journal: `violation` lines, and numbers that the report compares with the engine's noise.
"""

import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from soak import faults, journal
from soak.ledger import Ledger
from soak.notes import AuditedECMetadata, AuditedMetadata, Keys, WholePrompt
from soak.replay import Job, Replay
from soak.rows import read_rows, reused_row_problem, write_rows
from vlcache_connector.engine import ec_sides, kv_worker
from vlcache_connector.engine.ec_sides import ECWorker
from vlcache_connector.engine.kv_worker import VLCacheWorker
from vlcache_connector.engine.metadata import ReusePiece
from vlcache_connector.exec.rope import position_delta
from vlcache_connector.types import Run

_SPLIT = 13
"""Tokens per pass of the second replay, which shows the noise: fewer than any matrix kernel works on at a time."""


class Auditor:
    """One per worker process. `share` of the jobs are replayed; all others are looked at as well, but not computed
    again.
    """

    def __init__(self, seed: int, share: float, has_disk: bool) -> None:
        self._dice = random.Random(f"{seed} audits")
        self._share = share
        self._ledger = Ledger(comes_back=has_disk)
        self._pieces: dict[int, list[ReusePiece]] = {}
        self._replay: Replay | None = None
        self._encoded: dict[str, dict[int, torch.Tensor]] = {}  # by request, then by offset
        self._spoils_pages = False
        self._slab: Any = None
        self.keys: Keys = {}
        self.step: AuditedMetadata | None = None

    # -- entries ------------------------------------------------------------------------------------------------------

    def wrote(self, slab: Any, job_id: int, offset: int) -> None:
        for start, nbytes, key in self.keys[job_id]:
            if start == offset:
                self._slab = slab._bytes
                self._ledger.wrote(self._slab, start, nbytes, key)
                journal.note("audit", what="written")

    def check_read(self, slab: Any, job_id: int, when: str) -> None:
        for offset, nbytes, key in self.keys[job_id]:
            problem = self._ledger.problem(slab._bytes, offset, nbytes, key)
            journal.note("audit", what="entry")
            if problem is not None:
                journal.note("violation", what=f"{problem} ({when})", job=job_id)

    # -- pages --------------------------------------------------------------------------------------------------------

    def before(self, worker: VLCacheWorker, pieces: Sequence[ReusePiece]) -> None:
        for piece in pieces:
            self._pieces.setdefault(piece.job_id, []).append(piece)
            if piece.error is None:
                self.check_read(worker._session.slab, piece.job_id, "before a piece")

    def behind(self, worker: VLCacheWorker, pieces: Sequence[ReusePiece]) -> None:
        for piece in pieces:
            if not piece.is_last:
                continue
            job = self._pieces.pop(piece.job_id)
            if piece.request_id in worker.answers.failed:
                continue
            self.check_read(worker._session.slab, piece.job_id, "behind the last piece")
            whole = _joined(job)
            if self._spoils_pages:
                self._spoil_pages(worker, whole)
            self._check_reused(worker, whole, piece)
            if self._dice.random() < self._share:
                self._replay_job(worker, whole, piece)

    def _check_reused(self, worker: VLCacheWorker, job: Job, piece: ReusePiece) -> None:
        assert worker._pages is not None
        slab, positions = worker._session.slab, worker._stack.positions(job.prompt)
        for span in job.spans:
            if job.is_shifted(span):
                continue  # what its rows must be, the replay says
            wanted = positions[:, span.offset : span.offset + span.length]
            delta = position_delta(slab.positions(span.kv, span.length), wanted)
            entry = slab.kv(span.kv, span.length)
            for run in span.reused:
                found = read_rows(worker._pages, job.block_ids, run)
                stored = entry[:, :, run.start - span.offset : run.end - span.offset]
                problem = reused_row_problem(found, stored, delta, worker._stack.rope)
                journal.note("audit", what="reused", tokens=len(run), delta=delta)
                if problem is not None:
                    journal.note("violation", what=problem, request=piece.request_id, run=[run.start, run.end])

    def _replay_job(self, worker: VLCacheWorker, job: Job, piece: ReusePiece) -> None:
        assert worker._pages is not None
        replay = self._scratch(worker)
        found = read_rows(worker._pages, job.block_ids, Run(job.start, job.end))
        alone = replay.rows(job)
        gap = (found - alone).abs().max().item()
        is_split = not job.shifts and self._dice.random() < 0.25
        noise = (replay.rows(job, _SPLIT) - alone).abs().max().item() if is_split else None
        journal.note("replay", request=piece.request_id, gap=gap, noise=noise, size=alone.abs().max().item())
        whole = self.step.loaded.get(piece.job_id) if self.step is not None else None
        if whole is not None:
            replay.rows(job)  # in place again, whatever the noise left
            self._foretell(whole, replay.first_token(whole.prompt, whole.covered), "loaded")

    def foretell_resumed(self, worker: VLCacheWorker, requests: Sequence[WholePrompt]) -> None:
        """Requests that go on behind approximate blocks of the prefix cache, which this step has completed."""
        for whole in requests:
            if self._dice.random() < self._share:
                top = self._scratch(worker).first_token(whole.prompt, whole.covered, whole.block_ids)
                self._foretell(whole, top, "resumed")

    def foretell_behind(self, worker: VLCacheWorker, step: AuditedMetadata) -> None:
        """Requests with images behind approximate KV: their encoder output is kept until the prompt is complete."""
        for name in step.over:
            self._encoded.pop(name, None)
        for request in step.behind:
            name, cache = request.whole.request_id, worker._session.encoder_cache
            known = self._encoded.setdefault(name, {})
            known |= {at: cache[image].clone() for at, image in request.images if at not in known and image in cache}
            if request.is_complete:
                self._encoded.pop(name)
                if len(known) < len(request.images):
                    journal.note("audit", what="image behind that was gone")
                elif self._dice.random() < self._share:
                    whole, scratch = request.whole, self._scratch(worker)
                    top = scratch.first_token(whole.prompt, whole.covered, whole.block_ids, list(known.items()))
                    self._foretell(whole, top, "image behind")

    def _foretell(self, whole: WholePrompt, top: list[tuple[int, float]], how: str) -> None:
        journal.note("foretold", request=whole.request_id, how=how, num_local=whole.num_local, top=top)

    def spoil(self, *_: Any) -> None:
        """From now on nothing is right any more: a signal's handler, for the proof that the auditors notice."""
        self._spoils_pages = True
        for offset in self._ledger.offsets():
            self._slab[offset + 1] ^= 0x55

    def _spoil_pages(self, worker: VLCacheWorker, job: Job) -> None:
        """One recomputed token's rows become those of no token at all, as if another request had written there."""
        assert worker._pages is not None
        if job.recomputed:
            run = Run(job.recomputed[-1].end - 1, job.recomputed[-1].end)
            write_rows(worker._pages, job.block_ids, run, -read_rows(worker._pages, job.block_ids, run))

    def _scratch(self, worker: VLCacheWorker) -> Replay:
        if self._replay is None:
            self._replay = Replay(worker, worker._vllm_config.model_config.max_model_len)
        return self._replay


def attach(auditor: Auditor) -> None:
    """Wrap the worker side. An auditor that breaks is a violation, never an error of the connector."""
    _attach_to_steps(auditor)
    _attach_to_encoder(auditor)


def _attach_to_steps(auditor: Auditor) -> None:
    run_step, reuse, store = VLCacheWorker.run_step, VLCacheWorker._reuse, VLCacheWorker._store

    def running(self: VLCacheWorker, metadata: Any) -> None:
        auditor.step = metadata if isinstance(metadata, AuditedMetadata) else None
        auditor.keys |= getattr(metadata, "keys", {})
        run_step(self, metadata)
        if auditor.step is not None:
            _audit(auditor.foretell_resumed, self, auditor.step.resumed)
            _audit(auditor.foretell_behind, self, auditor.step)
        auditor.keys.clear()

    def reusing(self: VLCacheWorker, pieces: Sequence[ReusePiece]) -> None:
        _audit(auditor.before, self, pieces)
        reuse(self, pieces)
        _audit(auditor.behind, self, pieces)

    def storing(self: VLCacheWorker, run: Run, block_ids: Any, positions: Any, job: Any) -> None:
        store(self, run, block_ids, positions, job)
        _audit(auditor.wrote, self._session.slab, job.job_id, job.kv.offset)

    wrapped = {"run_step": running, "_reuse": reusing, "_store": storing}
    for name, function in wrapped.items():
        setattr(VLCacheWorker, name, function)


def _attach_to_encoder(auditor: Auditor) -> None:
    start_load, save = ECWorker.start_load, ECWorker.save

    def starting_load(self: ECWorker, encoder_cache: Any, metadata: Any) -> None:
        if isinstance(metadata, AuditedECMetadata):
            auditor.keys |= metadata.keys
            for job in metadata.loads:
                _audit(auditor.check_read, self._session.slab, job.job_id, "before an embedding is loaded")
        start_load(self, encoder_cache, metadata)

    def saving(self: ECWorker, identifier: str, metadata: Any) -> None:
        auditor.keys |= getattr(metadata, "keys", {})
        save(self, identifier, metadata)

    for owner in (kv_worker, ec_sides):
        setattr(owner, "save_embedding", _noting_embedding(owner.save_embedding, auditor))  # noqa: B010
    setattr(ECWorker, "start_load", starting_load)  # noqa: B010
    setattr(ECWorker, "save", saving)  # noqa: B010


def _noting_embedding(save_embedding: Callable[..., None], auditor: Auditor) -> Callable[..., None]:
    def saving_embedding(session: Any, job: Any) -> None:
        save_embedding(session, job)
        _audit(auditor.wrote, session.slab, job.job_id, job.extent.offset)

    return saving_embedding


def _audit(work: Callable[..., None], *args: Any) -> None:
    try:
        with faults.calm():
            work(*args)
    except Exception as error:
        journal.note("violation", what=f"an auditor broke: {error!r}", traceback=traceback.format_exc())


def _joined(pieces: Sequence[ReusePiece]) -> Job:
    spans: dict[int, Any] = {}
    for piece in pieces:
        for span in piece.spans:
            known = spans.get(span.offset)
            spans[span.offset] = span if known is None else replace(known, reused=(*known.reused, *span.reused))
    recomputed = tuple(run for piece in pieces for run in piece.recomputed)
    reused = [run for span in spans.values() for run in span.reused]
    last = pieces[-1]
    start = min(run.start for run in (*recomputed, *reused))
    return Job(last.prompt, last.block_ids, start, tuple(spans.values()), recomputed, last.shifts)
