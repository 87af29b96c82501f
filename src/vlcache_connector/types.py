"""Words of the domain as plain data. No torch, no vLLM: every other module may import this one."""

from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """What one request agrees to, and the most that an engine allows. Each includes what comes after it."""

    REUSE = "reuse"  # KV of known spans may be approximate
    EXACT = "exact"  # only true prefix hits; encoder embeddings (always exact) are still reused
    OFF = "off"  # plain vLLM


class Reason(StrEnum):
    """Why a request, or a part of it, was left to the engine. Values are metric labels."""

    INVALID_OPTIONS = "invalid_options"
    MODE = "mode"
    NO_MEDIA = "no_media"
    MISS = "miss"
    BEHIND_NEW_IMAGE = "behind_new_image"
    IN_PREFIX_CACHE = "in_prefix_cache"
    TOO_FEW_TOKENS = "too_few_tokens"
    NO_GAIN = "no_gain"  # computing the range is cheaper, going by what both cost in this engine so far
    DRIFT = "drift"  # audits found reuse too far from full computation: it is switched off for now
    LOAD_FAILED = "load_failed"
    LORA = "lora"
    PROMPT_LOGPROBS = "prompt_logprobs"
    POOLING = "pooling"
    PROMPT_EMBEDS = "prompt_embeds"
    STREAMING_INPUT = "streaming_input"
    EMBEDDING_INPUT = "embedding_input"
    MODALITY = "modality"
    SPARSE_PLACEHOLDER = "sparse_placeholder"
    CLIENT_UUID = "client_uuid"
    SIBLING = "sibling"  # another connector of the engine would mix approximate with exact KV
    ENGINE = "engine"  # something about the whole engine; the log names it


@dataclass(frozen=True, slots=True)
class Run:
    """A half-open range of token positions [start, end)."""

    start: int
    end: int

    def __len__(self) -> int:
        return max(0, self.end - self.start)

    def intersect(self, other: "Run") -> "Run":
        """The common range; empty (length 0) when the two are disjoint."""
        return Run(max(self.start, other.start), min(self.end, other.end))


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens [offset, offset + length) of one reusable item, and the keys under which the store knows it."""

    offset: int
    length: int
    kv_key: bytes
    embedding_key: bytes
    modality: str = "image"  # one of `MODALITIES`
    num_text: int = 0  # of its tokens: text between frames, which has no encoder output

    @property
    def num_embedded(self) -> int:
        """Rows of its encoder output."""
        return self.length - self.num_text

    @property
    def entries(self) -> tuple[tuple[str, bytes, int], ...]:
        """Kind, key and tokens of its entries."""
        return ("kv", self.kv_key, self.length), ("embedding", self.embedding_key, self.num_embedded)

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def run(self) -> Run:
        return Run(self.offset, self.end)


Ratio = float | tuple[float, ...]
"""Share of a span's tokens: the same in all layers, or one for each layer."""


class Measure(StrEnum):
    """What a pass can see of recomputed tokens that tells which of them to go on with."""

    DEVIATION = "deviation"  # how far their fresh KV is from the stored one
    ATTENTION = "attention"  # how much the question looks at them


@dataclass(frozen=True, slots=True)
class Narrowing:
    """From `layer` on, fewer of a span's tokens are recomputed: the `count` of `runs`, or of those that the pass finds
    worth it, where only a measure tells. Then counts of a request's spans are for all of these together.
    """

    layer: int
    count: int
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """The part of a plan that concerns one span: absolute runs of reused and of recomputed tokens.

    `recomputed` holds before the first layer. Where fewer tokens are recomputed in deeper ones, `reused` holds all that
    some layer takes from the entry.
    """

    span: Span
    reused: tuple[Run, ...]
    recomputed: tuple[Run, ...]
    narrowings: tuple[Narrowing, ...] = ()

    def num_dropped(self, num_layers: int) -> float:
        """How many of the recomputed tokens are not any more, on average over the layers."""
        edges = [*(narrowing.layer for narrowing in self.narrowings), num_layers]
        first = sum(len(run) for run in self.recomputed)
        layers = zip(self.narrowings, edges[1:], strict=True)
        return sum((first - one.count) * (end - one.layer) for one, end in layers) / num_layers


@dataclass(frozen=True, slots=True)
class ReusePlan:
    """Which tokens of the covered range [start, end) are reused and which are recomputed; the rest is the engine's.

    `recomputed` holds every token of the range that is not reused, in order: text, separators, and chosen span tokens.
    With `shifts`, reused tokens follow the change of the recomputed ones of their span (`exec.shift`). `measure` is
    that of narrowings without runs. A token that is recomputed in half of the layers counts as half of one.
    """

    start: int
    end: int
    spans: tuple[SpanPlan, ...]
    recomputed: tuple[Run, ...]
    shifts: bool = False
    measure: Measure | None = None
    num_layers: int = 1

    @property
    def num_reused(self) -> int:
        return self.end - self.start - self.num_recomputed

    @property
    def num_recomputed(self) -> int:
        dropped = sum(part.num_dropped(self.num_layers) for part in self.spans)
        return round(sum(len(run) for run in self.recomputed) - dropped)

    @property
    def keeps_spans_whole(self) -> bool:
        """Whether what becomes of a span's tokens depends on others of them: they are dealt with at once."""
        return self.shifts or any(part.narrowings for part in self.spans)

    @property
    def first_reused(self) -> int | None:
        """Position of the first token whose KV is approximate; None when the plan reuses nothing."""
        return min((run.start for part in self.spans for run in part.reused), default=None)


MAX_ORDERED = 128
"""Part of the layout of entries. What a policy takes beyond it is spread over the span."""


def num_ordered(length: int) -> int:
    """How many tokens of a span an entry puts in order of how well they stand for all of it."""
    return min(length, MAX_ORDERED)


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of the host slab."""

    offset: int
    nbytes: int


KINDS = ("kv", "embedding")
MODALITIES = ("image", "video")


@dataclass(frozen=True, slots=True)
class EntryClass:
    """What quotas and times to live go by."""

    kind: str  # one of `KINDS`
    modality: str  # one of `MODALITIES`
    tenant: str = ""  # 16 hex digits that stand for a cache_salt; empty without one
