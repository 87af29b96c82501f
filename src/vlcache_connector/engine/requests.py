"""What the scheduler side remembers of each request, and how that is read off vLLM's request object."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlcache_connector.config import Options, RequestOptions
from vlcache_connector.engine.debug import LoadRecord
from vlcache_connector.engine.namespace import Chain
from vlcache_connector.engine.support import feature_reason, frames_of, request_reason
from vlcache_connector.errors import OptionError
from vlcache_connector.exec.model import Media, Prompt
from vlcache_connector.plan.costs import Estimate
from vlcache_connector.plan.keys import KeySpace, digest, entry_class
from vlcache_connector.policy.scored import Scored
from vlcache_connector.store.host import HostEntry
from vlcache_connector.types import EntryClass, Mode, Ratio, Reason, ReusePlan, Run, Span

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

PARAMS_KEY = "vlcache"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the prompt's tokens came from, or why not from the store."""

    plan: ReusePlan | Reason | None
    num_local: int


@dataclass(slots=True)
class RequestState:
    """One live request. `spans` and `media` describe its media items up to the first that cannot be a span."""

    request: "Request"
    options: RequestOptions
    declined: Reason | None  # for good
    error: str | None = None  # what was wrong with the request's options
    follows_engine: bool = True  # policy and ratio are the engine's defaults
    is_suspended: bool = False  # reuse was switched off when the request came
    spans: tuple[Span, ...] = ()
    media: tuple[Media, ...] = ()
    chain: Chain | None = None  # where the block hashes leave the exact chain
    plan: ReusePlan | Reason | None = None  # outcome of the latest question
    unused: ReusePlan | None = None  # the plan, to be audited also if the guard's caution forbids it
    available: tuple[bool, ...] = ()  # which spans were at hand, at the latest question
    estimate: Estimate | None = None  # of the latest plan
    is_approximate: bool = False  # some KV of this request is, or builds on, reused KV
    is_loaded: bool = False  # the plan was carried out
    load: LoadRecord | None = None  # of the latest plan that was admitted
    outcome: "Outcome | None" = None  # of the first admission; a preempted request is admitted again
    held: list[HostEntry] = field(default_factory=list)  # pinned until the request has finished
    tier: str = "host"  # the lowest that entries of the plan came from
    num_local: int = 0
    first_unsaved: int = 0  # spans before this one were completed and dealt with
    reports: bool = False  # whether the response says what happened
    is_traced: bool = False  # its look-ups are in the trace

    def entry_class(self, kind: str, span: Span) -> EntryClass:
        """Of one of this request's entries; `kind` is "kv" or "embedding"."""
        return entry_class(kind, span.modality, self.request.cache_salt)

    @property
    def namespace(self) -> tuple[str, Ratio]:
        """Of the request's approximate KV."""
        policy = self.options.policy
        if policy == Scored.name:  # what is right for one question may be wrong for the next
            tokens = self.request.prompt_token_ids or []
            policy += digest(repr(tokens).encode()).hex()
        return policy, self.options.recompute_ratio

    def prompt(self, end: int) -> Prompt:
        """The prompt's first `end` tokens, for the worker."""
        tokens = self.request.prompt_token_ids
        assert tokens is not None
        return Prompt(tuple(tokens[:end]), tuple(m for m in self.media if m.offset + m.length <= end))

    def report(self) -> dict[str, Any]:
        """The response's `kv_transfer_params["vlcache"]`: where the prompt's tokens came from, and why not
        elsewhere.
        """
        outcome = self.outcome or Outcome(self.plan, self.num_local)
        plan = outcome.plan if isinstance(outcome.plan, ReusePlan) else None
        reused = plan.num_reused if plan else 0
        recomputed = plan.num_recomputed if plan else 0
        report: dict[str, Any] = {
            "mode": str(self.options.mode),
            "policy": self.options.policy,
            "reused_tokens": reused,
            "recomputed_tokens": recomputed,
            "prefix_cached_tokens": outcome.num_local,
            "computed_tokens": self.request.num_prompt_tokens - outcome.num_local - reused - recomputed,
            "tier": self.tier if plan else None,
            "approximate": self.is_approximate,
        }
        reason = self.declined or (outcome.plan if isinstance(outcome.plan, Reason) else None)
        if reason is not None:
            report["reason"] = str(reason)
        if self.error is not None:
            report["error"] = self.error
        if self.options.explain:
            report["plan"] = self._explain(plan)
        return report

    def _explain(self, plan: ReusePlan | None) -> dict[str, Any]:
        """Each span with its runs as [start, end) pairs, and where deeper layers recompute less of it; all recomputed
        runs, expected seconds.
        """
        parts = {part.span: part for part in plan.spans} if plan else {}
        spans = []
        for number, span in enumerate(self.spans):
            part = parts.get(span)
            spans.append(
                {
                    "modality": span.modality,
                    "offset": span.offset,
                    "length": span.length,
                    "is_known": number < len(self.available) and self.available[number],
                    "reused": _edges(part.reused) if part else [],
                    "recomputed": _edges(part.recomputed) if part else [],
                    "deeper": [
                        {"layer": one.layer, "count": one.count, "recomputed": _edges(one.runs)}
                        for one in (part.narrowings if part else ())
                    ],
                }
            )
        explained: dict[str, Any] = {
            "covered": [plan.start, plan.end] if plan else None,
            "spans": spans,
            "recomputed": _edges(plan.recomputed) if plan else [],
        }
        if self.estimate is not None:
            explained["expected_s"] = {"reuse": self.estimate.reuse_s, "compute": self.estimate.compute_s}
        return explained


def describe(request: "Request", keys: KeySpace, engine: Options, num_layers: int) -> RequestState:
    """Read a new request. Bad options make it a request in mode `off` that carries the error."""
    params = request.kv_transfer_params
    raw = params.get(PARAMS_KEY) if isinstance(params, dict) else None
    reports = bool(request.mm_features) or raw is not None
    try:
        options = RequestOptions.parse(raw, engine)
        _check_ratio(options.recompute_ratio, num_layers)
    except OptionError as error:
        off = RequestOptions(Mode.OFF)
        return RequestState(request, off, Reason.INVALID_OPTIONS, str(error), reports=reports)
    reason = Reason.MODE if options.mode is Mode.OFF else request_reason(request)
    follows_engine = raw is None or not {"policy", "recompute_ratio"} & raw.keys()
    state = RequestState(request, options, reason, reports=reports, follows_engine=follows_engine)
    if reason is None:
        _find_spans(state, keys, engine.trust_client_uuids)
    return state


def _edges(runs: Sequence[Run]) -> list[list[int]]:
    return [[run.start, run.end] for run in runs]


def _check_ratio(ratio: Ratio, num_layers: int) -> None:
    if isinstance(ratio, tuple) and len(ratio) != num_layers:
        raise OptionError(f"option 'recompute_ratio' has {len(ratio)} numbers; this model has {num_layers} layers")


def _find_spans(state: RequestState, keys: KeySpace, trust_client_uuids: bool) -> None:
    """Fill in spans and media up to the first item that cannot be a span: later positions may depend on that item."""
    salt = state.request.cache_salt
    spans: list[Span] = []
    media: list[Media] = []
    for feature in sorted(state.request.mm_features, key=lambda f: f.mm_position.offset):
        reason = feature_reason(feature, trust_client_uuids)
        if reason is not None:
            state.declined = None if spans else reason
            break
        item, name = _media_of(feature), (feature.modality, feature.identifier, salt)
        kv_key = keys.kv(*name, _form_of(item, state.request.prompt_token_ids or []))
        num_text = item.length - item.num_embedded
        spans.append(Span(item.offset, item.length, kv_key, keys.embedding(*name), feature.modality, num_text))
        media.append(item)
    state.spans, state.media = tuple(spans), tuple(media)


def _media_of(feature: "MultiModalFeatureSpec") -> Media:
    """Of an item that can be a span."""
    data: Any = feature.data
    place, seconds = feature.mm_position, data.get("second_per_grid_ts")
    return Media(
        place.offset,
        place.length,
        tuple(data[f"{feature.modality}_grid_thw"].data.tolist()),
        feature.modality,
        float(seconds.data) if seconds is not None else None,
        frames_of(feature) or (),
    )


def _form_of(item: Media, token_ids: Sequence[int]) -> str:
    """How an item became tokens: where they lie among themselves and, where text stands between its frames, that text
    and its places.
    """
    if not item.frames:
        return item.places
    text = array("q", token_ids[item.offset : item.offset + item.length]).tobytes()
    frames = array("q", [edge for frame in item.frames for edge in (frame.start, frame.end)]).tobytes()
    return f"{item.places} {digest(text, frames).hex()}"


def wants_embeddings(request: "Request", engine: Options) -> bool:
    """Whether encoder outputs may be stored for, and served to, this request. They are exact in every mode."""
    params = request.kv_transfer_params
    raw = params.get(PARAMS_KEY) if isinstance(params, dict) else None
    try:
        return RequestOptions.parse(raw, engine).mode is not Mode.OFF
    except OptionError:
        return False
