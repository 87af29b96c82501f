"""What the workers of the fake engine write in place of keys, values and embeddings, and what they should find."""

from dataclasses import dataclass

from vlcache_connector.types import Run

Content = int | tuple[str, int]  # a text token, or a token of an image: (identifier, index within the image)
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

    def record(self, position: int, is_exact: bool, weights: int) -> Record:
        digest, ratio = (self.digests[position], None) if is_exact else (None, self.ratio)
        return Record(self.contents[position], position, self.tenant, weights, digest, ratio)

    def image(self, run: Run) -> str:
        """The identifier of the image that fills `run`."""
        found = [self.contents[position] for position in (run.start, run.end - 1)]
        assert isinstance(found[0], tuple) and found == [(found[0][0], 0), (found[0][0], len(run) - 1)], (
            "no whole image"
        )
        return found[0][0]


@dataclass(frozen=True, slots=True)
class Entry:
    kind: str
    identifier: str
    tenant: str | None
    num_tokens: int
    weights: int
