"""The worker side of the fake engine: it keeps a record of what was written to each slot, in place of keys and values.

A record names the token, its position, its tenant and the weights that were in use; when all that it was computed from
was computed exactly, it also holds a digest of the whole prompt up to there. Every read compares the records with what
the reader's own prompt says: a slot that nobody wrote, that was written for something else or that the reader did not
agree to is an `AssertionError` in the very step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.outputs import ECConnectorOutput, KVConnectorOutput, ModelRunnerOutput

from engine.fake_entries import FakeEntries
from engine.fake_records import IMAGE_TOKEN, Entry, Record, Truth, kv_entry
from vlcache_connector.engine.metadata import (
    AuditJob,
    CompileJob,
    EmbeddingJob,
    JobResults,
    ReusePiece,
    SaveJob,
    VLCacheECMetadata,
    VLCacheECWorkerMetadata,
    VLCacheMetadata,
    VLCacheWorkerMetadata,
)
from vlcache_connector.exec.audit import Drift
from vlcache_connector.exec.model import Prompt
from vlcache_connector.types import Extent, Run


@dataclass(slots=True)
class _Live:
    """A request as the model runner knows it."""

    token_ids: list[int]
    block_ids: list[int]
    start: int  # tokens that are computed before this step
    features: list[Any]  # as vLLM sent them: images that were covered on admission have lost their pixels


@dataclass(slots=True)
class _Copies:
    """What a step has begun and the next one ends, and what may be said then."""

    results: JobResults = field(default_factory=JobResults)
    reads: list[tuple[Extent, Entry]] = field(default_factory=list)
    writes: list[tuple[Extent, Entry, bool]] = field(default_factory=list)


@dataclass(slots=True)
class FakeWorker:
    """One rank. `is_struck(stage, rank, request_id)` says whether a job fails."""

    rank: int
    block_size: int
    truths: dict[str, Truth]
    is_struck: Callable[[str, int, str], bool]
    keeps_pixels: bool
    entries: FakeEntries
    audited: Callable[[AuditJob], float]  # the KL divergence that an audit finds
    are_copies_done: Callable[[], bool]  # whether those of the last step are, before the next one
    is_late: bool  # memory is read and written by copies that end in the next step, as those of a GPU do
    weights: int = 0
    pages: dict[int, Record] = field(default_factory=dict)  # slot -> what was written there
    encoder_cache: set[str] = field(default_factory=set)
    encoded: list[str] = field(default_factory=list)  # images that the encoder worked on
    _live: dict[str, _Live] = field(default_factory=dict)
    _errors: dict[str, str] = field(default_factory=dict)
    _shifted: set[tuple[int, int]] = field(default_factory=set)  # (job, offset of a span)
    _copies: _Copies = field(default_factory=_Copies)

    def execute(self, output: Any, fresh_blocks: Iterable[int]) -> ModelRunnerOutput:
        """One step, in the order of vLLM's V1 model runner. What is in freshly allocated blocks is lost."""
        for block in fresh_blocks:
            for slot in range(block * self.block_size, (block + 1) * self.block_size):
                self.pages.pop(slot, None)
        self._update_requests(output)
        encoder_output, sampled = None, dict[str, list[int]]()
        if output.total_num_scheduled_tokens > 0:
            encoder_output = self._encode(output)
            sampled = {name: self._forward(name, num) for name, num in output.num_scheduled_tokens.items()}
        index = {request_id: number for number, request_id in enumerate(sampled)}
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index=index,
            sampled_token_ids=list(sampled.values()),
            kv_connector_output=self._carry_out(output.kv_connector_metadata),
            ec_connector_output=encoder_output,
        )

    # -- the model runner ---------------------------------------------------------------------------------------------

    def _update_requests(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self._live.pop(request_id, None)
        self.encoder_cache.difference_update(output.free_encoder_mm_hashes)
        for new in output.scheduled_new_reqs:
            tokens, blocks = list(new.prompt_token_ids), list(new.block_ids[0])
            self._live[new.req_id] = _Live(tokens, blocks, new.num_computed_tokens, new.mm_features)
        cached = output.scheduled_cached_reqs
        for number, request_id in enumerate(cached.req_ids):
            live, blocks = self._live[request_id], cached.new_block_ids[number]
            if request_id in cached.resumed_req_ids:
                live.block_ids = []
            if request_id in cached.all_token_ids:
                live.token_ids = list(cached.all_token_ids[request_id])
            live.block_ids += blocks[0] if blocks is not None else []
            live.start = cached.num_computed_tokens[number]

    def _forward(self, request_id: str, num_tokens: int) -> list[int]:
        """Compute the request's tokens of this step; returns the sampled token unless the prompt goes on."""
        live, truth = self._live[request_id], self.truths[request_id]
        run = Run(live.start, live.start + num_tokens)
        assert run.end <= len(live.token_ids), f"{request_id} computes tokens that are not known yet"
        assert tuple(live.token_ids) == truth.token_ids[: len(live.token_ids)], f"{request_id} has wrong tokens"
        images = {content[0] for content in truth.contents[run.start : run.end] if isinstance(content, tuple)}
        assert images <= self.encoder_cache, f"{request_id} computes an image that was not encoded"
        self._compute(truth, live.block_ids, run)
        if run.end < len(live.token_ids):
            return []
        live.token_ids.append(truth.token_ids[run.end])
        return [live.token_ids[-1]]

    def _encode(self, output: Any) -> ECConnectorOutput:
        metadata, results = output.ec_connector_metadata, JobResults()
        assert isinstance(metadata, VLCacheECMetadata)
        for load in metadata.loads:
            tenant = self.truths[load.request_id].tenant
            self._check_entry(load.extent, Entry("embedding", load.identifier, tenant, load.num_tokens, self.weights))
            is_lost = self.is_struck("embedding", self.rank, load.request_id)
            self.encoder_cache.add(load.identifier)  # by the encoder, when the entry could not be loaded
            self.encoded += [load.identifier] if is_lost else []
            _answer(results, load.job_id, "lost" if is_lost else None)
        for request_id, indices in output.scheduled_encoder_inputs.items():
            for feature in (self._live[request_id].features[index] for index in indices):
                has_pixels = self.keeps_pixels or feature.data.keys() & {"pixel_values", "pixel_values_videos"}
                assert has_pixels, "the engine wants to encode an image whose pixels it dropped"
                self.encoder_cache.add(feature.identifier)
                self.encoded.append(feature.identifier)
        for save in metadata.saves:
            self._save_embedding(results, save)
        return ECConnectorOutput(ec_connector_worker_meta=VLCacheECWorkerMetadata(results) if results else None)

    # -- the connector ------------------------------------------------------------------------------------------------

    def _carry_out(self, metadata: VLCacheMetadata) -> KVConnectorOutput:
        output, results = KVConnectorOutput(finished_recving=set()), JobResults()
        ending, self._copies = self._copies, _Copies()
        late = self._copies.results if self.is_late else results
        for save in metadata.saves:
            self._save(late, save)
        for embedding in metadata.embeddings:
            self._save_embedding(late, embedding)
        for piece in metadata.reuse:
            self._load(piece)
        for piece in metadata.reuse:
            self._recompute(piece)
            if piece.is_last:
                error = self._errors.pop(piece.request_id, None)
                _answer(results, piece.job_id, error)
                late.released[piece.job_id] = 1
                output.finished_recving.add(piece.request_id)
                output.failed_recving |= {piece.request_id} if error is not None else set()
        for compiling in metadata.compiles:
            self._compile(late, compiling)
        for audit in metadata.audits:
            assert not metadata.num_computed_tokens and not metadata.reuse, "audits are for idle steps"
            self._audit(results, audit)
        self._end(ending)
        results.merge(ending.results)
        output.kv_connector_worker_meta = VLCacheWorkerMetadata(results) if results else None
        return output

    def _end(self, copies: _Copies) -> None:
        for extent, wanted in copies.reads:
            self._check_entry(extent, wanted)
        for extent, entry, is_lost in copies.writes:
            self.entries.write(extent, entry, is_lost)

    def take(self, waits: bool) -> JobResults | None:
        """As `exec.late.Late` does: what may be said between two steps."""
        if waits or self.are_copies_done():
            ending, self._copies = self._copies, _Copies()
            self._end(ending)
            return ending.results
        return None

    def _load(self, piece: ReusePiece) -> None:
        truth = self.truths[piece.request_id]
        if piece.error is not None:
            self._errors.setdefault(piece.request_id, piece.error)
            return
        assert piece.prompt.token_ids == truth.token_ids[: len(piece.prompt.token_ids)]
        if self.is_struck("piece", self.rank, piece.request_id):
            self._errors.setdefault(piece.request_id, "the piece was lost")
        for span in piece.spans:
            if piece.shifts and span.reused:
                assert (piece.job_id, span.offset) not in self._shifted, "the tokens of a span move in one piece"
                self._shifted.add((piece.job_id, span.offset))
            wanted = truth.kv_entry(span.run, self.weights)
            self._check_entry(span.kv, wanted)
            if self.is_late:
                self._copies.reads.append((span.kv, wanted))
            self._check_embedding(piece, truth, span.offset, span.embedding)
            for run in span.reused:
                self._write(truth, piece.block_ids, run, is_exact=False)

    def _recompute(self, piece: ReusePiece) -> None:
        truth = self.truths[piece.request_id]
        for run in _settled(piece):
            if piece.request_id in self._errors:
                self._write(truth, piece.block_ids, run, is_exact=False)
                continue
            images = {content[0] for content in truth.contents[run.start : run.end] if isinstance(content, tuple)}
            assert images <= {truth.images[span.run] for span in piece.spans}, "an embedding is missing in the piece"
            self._compute(truth, piece.block_ids, run)

    def _save(self, results: JobResults, job: SaveJob) -> None:
        truth = self.truths[job.request_id]
        assert self._read(truth, job.block_ids, job.run.end), "approximate KV is stored"
        entry = truth.kv_entry(job.run, self.weights)
        self._put(results, job.job_id, job.kv, entry, self.is_struck("save", self.rank, job.request_id))

    def _save_embedding(self, results: JobResults, job: EmbeddingJob) -> None:
        assert job.identifier in self.encoder_cache, "an encoder output is to be saved that is not there"
        tenant = self.truths[job.request_id].tenant
        entry = Entry("embedding", job.identifier, tenant, job.num_tokens, self.weights)
        self._put(results, job.job_id, job.extent, entry, self.is_struck("save", self.rank, job.request_id))

    def _compile(self, results: JobResults, job: CompileJob) -> None:
        """Without a request: the embedding says whose image it is."""
        token_ids = job.prompt.token_ids[job.run.start :]
        assert job.run.end == len(job.prompt.token_ids) and len(job.run) == len(token_ids)
        embedding = self.entries.read(job.embedding, "embedding", token_ids.count(IMAGE_TOKEN))
        assert embedding is not None
        self._check_rows(job.prompt, job.run.start)
        assert IMAGE_TOKEN not in job.prompt.token_ids[: job.run.start], "an image whose embedding is not given"
        for position in range(job.run.end):
            slot = self._slot(job.block_ids, position)
            assert slot not in self.pages, "scratch blocks are somebody's"
            self.pages[slot] = Record(None, position, embedding.tenant, self.weights, None, None)
        entry = kv_entry(embedding.identifier, embedding.tenant, token_ids, embedding.weights)
        self._put(results, job.job_id, job.kv, entry, self.is_struck("compile", self.rank, ""))

    def _audit(self, results: JobResults, job: AuditJob) -> None:
        """Whether the job has all that both versions need, and is in nobody's way."""
        truth, piece = self.truths[job.request_id], job.piece
        assert piece.prompt.token_ids == truth.token_ids[: truth.num_prompt]
        runs = sorted([*_settled(piece), *(run for span in piece.spans for run in span.reused)], key=lambda r: r.start)
        assert [run.start for run in runs] == [0, *(run.end for run in runs[:-1])] and runs[-1].end == truth.num_prompt
        for span in piece.spans:
            self._check_entry(span.kv, truth.kv_entry(span.run, self.weights))
        images = [(span.offset, span.embedding) for span in piece.spans] + list(job.embeddings)
        for offset, extent in images:
            self._check_embedding(piece, truth, offset, extent)
        assert sorted(offset for offset, _ in images) == [run.start for run in truth.images], "an image is missing"
        for position in range(truth.num_prompt):
            slot = self._slot(piece.block_ids, position)
            assert slot not in self.pages, "scratch blocks are somebody's"
            self.pages[slot] = Record(None, position, truth.tenant, self.weights, None, None)
        error = "lost" if self.is_struck("audit", self.rank, job.request_id) else None
        if error is None:
            results.drifts[job.job_id] = Drift(((1.0, 4.0),), ((4.0, 16.0),), self.audited(job), True)
        _answer(results, job.job_id, error)

    # -- pages and entries --------------------------------------------------------------------------------------------

    def _slot(self, block_ids: Sequence[int], position: int) -> int:
        return block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def _read(self, truth: Truth, block_ids: Sequence[int], end: int) -> bool:
        """Look at all positions before `end` as the request would; returns whether all of it is exact."""
        is_exact = True
        for position in range(end):
            found = self.pages.get(self._slot(block_ids, position))
            where = f"{truth.request_id} at position {position}"
            assert found is not None, f"{where} reads what nobody wrote"
            assert found.content == truth.contents[position], f"{where} reads the KV of something else: {found}"
            assert found.position == position, f"{where} reads another position's KV: {found}"
            assert found.tenant == truth.tenant, f"{where} reads another tenant's KV: {found}"
            assert found.weights == self.weights, f"{where} reads KV of older weights"
            if found.digest is None:
                assert found.ratio == truth.ratio, f"{where} reads approximate KV without having agreed to it: {found}"
                is_exact = False
            assert found.digest in (None, truth.digests[position]), f"{where} reads KV of another beginning"
        return is_exact

    def _compute(self, truth: Truth, block_ids: Sequence[int], run: Run) -> None:
        self._write(truth, block_ids, run, self._read(truth, block_ids, run.start))

    def _write(self, truth: Truth, block_ids: Sequence[int], run: Run, is_exact: bool) -> None:
        for position in range(run.start, run.end):
            slot = self._slot(block_ids, position)
            assert slot not in self.pages, f"{truth.request_id} overwrites position {position}: {self.pages[slot]}"
            is_lost = truth.request_id in self._errors
            record = truth.record(position, is_exact, self.weights)
            self.pages[slot] = Record(None, position, None, 0, None, None) if is_lost else record

    def _check_entry(self, extent: Extent, wanted: Entry) -> None:
        found = self.entries.read(extent, wanted.kind, wanted.num_tokens)
        assert found == wanted, f"{extent} holds {found}, not {wanted}"

    def _check_embedding(self, piece: ReusePiece, truth: Truth, offset: int, extent: Extent) -> None:
        self._check_rows(piece.prompt, offset)
        run = next(run for run in truth.images if run.start == offset)
        self._check_entry(extent, truth.embedding_entry(run, self.weights))

    def _check_rows(self, prompt: Prompt, offset: int) -> None:
        """Whether encoder output is for the image's own tokens, and not for text between its frames."""
        embedded = [position for run in prompt.item(offset).embedded for position in range(run.start, run.end)]
        end = offset + prompt.item(offset).length
        assert embedded == [p for p in range(offset, end) if prompt.token_ids[p] == IMAGE_TOKEN]

    def _put(self, results: JobResults, job_id: int, extent: Extent, entry: Entry, is_lost: bool) -> None:
        if results is self._copies.results:  # what was there is no more, what will be is not yet
            self._copies.writes.append((extent, entry, is_lost))
            is_lost_now = True
        else:
            is_lost_now = is_lost
        self.entries.write(extent, entry, is_lost_now)
        _answer(results, job_id, "lost" if is_lost else None)


def _answer(results: JobResults, job_id: int, error: str | None) -> None:
    if error is None:
        results.succeeded[job_id] = 1
    else:
        results.failed[job_id] = error


def _settled(piece: ReusePiece) -> list[Run]:
    """What every layer recomputes. Of a span that deeper layers narrow, all tokens count as reused here."""
    runs = list(piece.recomputed)
    for span in piece.spans:
        if span.narrowings:
            before = [Run(run.start, min(run.end, span.run.start)) for run in runs]
            behind = [Run(max(run.start, span.run.end), run.end) for run in runs]
            runs = [run for pair in zip(before, behind, strict=True) for run in pair if len(run)]
    return runs
