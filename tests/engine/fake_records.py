"""What the workers of the fake engine write in place of keys, values and embeddings, and what they should find."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlcache_connector.types import Run

Content = int | tuple[str, int]  # a text token, or a token of an image: (identifier, row of the encoder's output)
IMAGE_TOKEN = 7
ENGINE_RATIO = -1.0  # stands for the engine's default, which may change


@dataclass(frozen=True, slots=True)
class Record:
    content: Content | None  # None: half-written by a load that failed
    position: int
    tenant: str | None
    weights: int
    digest: int | None  # of all contents up to here, when the record is exact
    ratio: float | None  # under which approximate records were made


@dataclass(frozen=True, slots=True)
class Truth:
    """What a request should see at each position, its answer included."""

    request_id: str
    token_ids: tuple[int, ...]
    contents: tuple[Content, ...]
    digests: tuple[int, ...]
    num_prompt: int
    tenant: str | None
    ratio: float | None  # None: does not agree to approximate KV
    images: Mapping[Run, str]  # identifiers by place

    def record(self, position: int, is_exact: bool, weights: int) -> Record:
        digest, ratio = (self.digests[position], None) if is_exact else (None, self.ratio)
        return Record(self.contents[position], position, self.tenant, weights, digest, ratio)

    def kv_entry(self, run: Run, weights: int) -> "Entry":
        """Of the image that fills `run`."""
        assert run in self.images, "no whole image"
        return kv_entry(self.images[run], self.tenant, self.token_ids[run.start : run.end], weights)

    def embedding_entry(self, run: Run, weights: int) -> "Entry":
        """Of the image that fills `run`: a row for each token that is not text."""
        assert run in self.images, "no whole image"
        num_rows = self.token_ids[run.start : run.end].count(IMAGE_TOKEN)
        return Entry("embedding", self.images[run], self.tenant, num_rows, weights)


@dataclass(frozen=True, slots=True)
class Entry:
    kind: str
    identifier: str
    tenant: str | None
    num_tokens: int
    weights: int


def kv_entry(identifier: str, tenant: str | None, token_ids: Sequence[int], weights: int) -> Entry:
    """Of an image that has these tokens in the prompt: text between its frames counts."""
    text = [f"{place}:{token}" for place, token in enumerate(token_ids) if token != IMAGE_TOKEN]
    return Entry("kv", " ".join([identifier, *text]), tenant, len(token_ids), weights)
