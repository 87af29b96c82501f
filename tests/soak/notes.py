"""What the auditors in the workers must know of the scheduler side: it travels with each step's metadata.

Jobs name byte ranges only. With the keys beside them, a worker can tell whether a range still holds the entry that the
scheduler side means. With the whole prompt beside the last piece of a reuse, it can compute the answer's first token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from soak import journal
from vlcache_connector.engine.ec_sides import ECScheduler
from vlcache_connector.engine.kv_scheduler import VLCacheScheduler
from vlcache_connector.engine.metadata import VLCacheECMetadata, VLCacheMetadata
from vlcache_connector.engine.requests import RequestState
from vlcache_connector.exec.model import Prompt
from vlcache_connector.types import ReusePlan

Keys = dict[int, list[tuple[int, int, bytes]]]
"""job -> (offset, bytes, key) of the entries that it reads or writes"""


@dataclass(frozen=True, slots=True)
class WholePrompt:
    """A request whose answer the worker shall foretell: all up to `covered` is in its blocks, the rest is text."""

    request_id: str
    prompt: Prompt
    block_ids: tuple[int, ...]
    num_local: int
    covered: int


@dataclass(frozen=True, slots=True)
class ImagesBehind:
    """A request that goes on behind approximate KV with images whose encoder output this step may have made."""

    whole: WholePrompt
    images: tuple[tuple[int, str], ...]  # offset and identifier
    is_complete: bool  # this step computes the last token of the prompt


@dataclass(slots=True)
class AuditedMetadata(VLCacheMetadata):
    keys: Keys = field(default_factory=dict)
    loaded: dict[int, WholePrompt] = field(default_factory=dict)  # reuse job whose last piece is in this step
    resumed: list[WholePrompt] = field(default_factory=list)  # on approximate blocks of the prefix cache, without a job
    behind: list[ImagesBehind] = field(default_factory=list)
    over: tuple[str, ...] = ()  # requests that have ended


@dataclass(slots=True)
class AuditedECMetadata(VLCacheECMetadata):
    keys: Keys = field(default_factory=dict)


_resumed: list[WholePrompt] = []
_covered: dict[str, int] = {}  # where the latest admission begins to compute
_num_local: dict[str, int] = {}  # local hit of the latest question, which a planted fault may have kept from the state


def attach() -> None:
    """Make the scheduler sides send what the auditors need."""
    _attach_to_questions()
    _attach_to_metadata()


def _attach_to_questions() -> None:
    ask, admit = VLCacheScheduler.get_num_new_matched_tokens, VLCacheScheduler.update_state_after_alloc
    finish = VLCacheScheduler.request_finished

    def asking(self: VLCacheScheduler, request: Any, num_local: int) -> int | None:
        _num_local[request.request_id] = num_local
        state = self._states.get(request.request_id)
        if state is not None and state.is_loaded:  # preempted: what was foretold of it may not come true
            journal.note("asked_again", request=request.request_id)
        return ask(self, request, num_local)

    def admitting(self: VLCacheScheduler, request: Any, block_ids: list[int], num_external: int) -> None:
        state = self._states.get(request.request_id)
        was_loaded = state is not None and state.is_loaded
        admit(self, request, block_ids, num_external)
        num_local = _num_local.pop(request.request_id, 0)
        _covered[request.request_id] = max(_covered.get(request.request_id, 0) * was_loaded, num_local + num_external)
        if state is None or was_loaded or num_external or not state.is_approximate:
            return
        whole = _whole_prompt(state, tuple(block_ids), num_local)
        if whole is not None:
            _resumed.append(whole)

    def finishing(self: VLCacheScheduler, request: Any) -> dict[str, Any] | None:
        state = self._states.get(request.request_id)
        journal.note("finished", request=request.request_id, approximate=state is not None and state.is_approximate)
        _num_local.pop(request.request_id, None)
        _covered.pop(request.request_id, None)
        return finish(self, request)

    setattr(VLCacheScheduler, "request_finished", finishing)  # noqa: B010
    setattr(VLCacheScheduler, "get_num_new_matched_tokens", asking)  # noqa: B010
    setattr(VLCacheScheduler, "update_state_after_alloc", admitting)  # noqa: B010


def _attach_to_metadata() -> None:
    build, build_ec = VLCacheScheduler.build_connector_meta, ECScheduler.build_connector_meta

    def building(self: VLCacheScheduler, output: Any) -> VLCacheMetadata:
        plain = build(self, output)
        jobs: tuple[Any, ...] = (*plain.reuse, *plain.saves, *plain.embeddings, *plain.compiles)
        resumed = _resumed.copy()
        _resumed.clear()
        return AuditedMetadata(
            plain.num_computed_tokens,
            plain.reuse,
            plain.saves,
            plain.embeddings,
            plain.compiles,
            plain.audits,
            _keys(self._session, {job.job_id for job in jobs}),
            _loaded(self, plain),
            resumed,
            list(_behind(self, output)),
            tuple(output.finished_req_ids),
        )

    def building_ec(self: ECScheduler, runs_forward: bool) -> VLCacheECMetadata:
        plain = build_ec(self, runs_forward)
        job_ids = {job.job_id for job in (*plain.loads, *plain.saves)}
        return AuditedECMetadata(plain.loads, plain.saves, _keys(self._session, job_ids))

    setattr(VLCacheScheduler, "build_connector_meta", building)  # noqa: B010
    setattr(ECScheduler, "build_connector_meta", building_ec)  # noqa: B010


def _loaded(scheduler: VLCacheScheduler, metadata: VLCacheMetadata) -> dict[int, WholePrompt]:
    found = {}
    for piece in metadata.reuse:
        state = scheduler._states.get(piece.request_id)
        if piece.is_last and piece.error is None and state is not None and isinstance(state.plan, ReusePlan):
            whole = _whole_prompt(state, piece.block_ids, state.plan.end)
            if whole is not None:
                found[piece.job_id] = whole
    return found


def _behind(scheduler: VLCacheScheduler, output: Any) -> Iterator[ImagesBehind]:
    for request_id, num_tokens in output.num_scheduled_tokens.items():
        state, covered = scheduler._states.get(request_id), _covered.get(request_id, 0)
        if state is None or not state.is_approximate or state.request.num_output_tokens:
            continue
        request = state.request
        places = [(feature.mm_position, feature.identifier) for feature in request.mm_features]
        images = tuple((place.offset, name) for place, name in places if place.offset + place.length > covered)
        if images and request.num_computed_tokens >= covered:
            prompt = state.prompt(request.num_prompt_tokens)
            assert scheduler._saves._kv_cache_manager is not None
            block_ids = scheduler._saves._kv_cache_manager.get_block_ids(request_id)[0]
            whole = WholePrompt(request_id, prompt, tuple(block_ids), state.num_local, covered)
            yield ImagesBehind(whole, images, request.num_computed_tokens + num_tokens >= request.num_prompt_tokens)


def _keys(session: Any, job_ids: set[int]) -> Keys:
    found: Keys = {}
    for job_id in job_ids:
        job = session._jobs[job_id]
        entries = [*job.pinned, *([job.written] if job.written is not None else [])]
        found[job_id] = [(entry.extent.offset, _content_nbytes(session, entry), entry.key) for entry in entries]
    return found


def _content_nbytes(session: Any, entry: Any) -> int:
    """Without what the extent is rounded up by, which moves to no other tier. The KV of a token is larger than its
    embedding.
    """
    kv_nbytes: int = session.layout.kv_nbytes(entry.num_tokens)
    embedding_nbytes: int = session.layout.embedding_nbytes(entry.num_tokens)
    return kv_nbytes if kv_nbytes <= entry.extent.nbytes else embedding_nbytes


def _whole_prompt(state: RequestState, block_ids: tuple[int, ...], covered: int) -> WholePrompt | None:
    """None where the answer cannot be foretold: an image stands behind, or the request has begun its answer."""
    request = state.request
    end = max((feature.mm_position.offset + feature.mm_position.length for feature in request.mm_features), default=0)
    if request.num_output_tokens or end > covered or covered >= request.num_prompt_tokens:
        return None
    prompt = state.prompt(request.num_prompt_tokens)
    return WholePrompt(request.request_id, prompt, block_ids, state.num_local, covered)
