"""What all tiers share: how an entry's bytes are named, and what a tier below the host tier can do. No torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vlcache_connector.errors import VLCacheError
from vlcache_connector.types import EntryClass, Extent

Count = Callable[[str, float, str], None]
"""Counts: name of a metric, value, label."""


class EntryLostError(VLCacheError):
    """A tier cannot give an entry back: it is gone, damaged, or not what its name says. Always a miss."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an entry, where it lies in memory.

    `KV` entries have a part `layer.I` for each layer, shape [2, tokens, heads, dim], `positions`, [3, tokens] I32, and
    `order`, [`num_ordered(tokens)`] I32; embedding entries have one part `embedding`, [tokens, width]. `dtype` is
    safetensors' name of it (BF16, F16, F32).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffer: memoryview  # of bytes, contiguous, writable


@dataclass(frozen=True, slots=True)
class EntryMeta:
    """What a tier keeps beside the bytes of an entry."""

    key: bytes  # 32 bytes
    num_tokens: int
    entry_class: EntryClass
    provenance: dict[str, str] = field(default_factory=dict)  # versions, and what the entry was computed under


class RankBytes(Protocol):
    """The host tier's bytes of one rank."""

    def parts(self, extent: Extent, kind: str, num_tokens: int) -> list[Part]:
        """The tensors of an entry of this kind ("kv" or "embedding"), in the order in which they lie there."""
        ...

    def order(self, extent: Extent, num_tokens: int) -> Sequence[int]:
        """Tokens that stand for all of a KV entry, most different first."""
        ...


class Tier(Protocol):
    """A place below the host tier. `find` is called on the scheduler's path: a dictionary look-up, no I/O. Everything
    else blocks and is called by I/O threads, several at a time.

    The bytes of an entry are one sequence of parts per rank; an entry is there only when all ranks' parts are.
    """

    name: str  # in metrics, reports and logs

    def find(self, key: bytes) -> int | None:
        """Tokens of the entry, or None when it is not there."""
        ...

    def read(self, meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> None:
        """Fill all parts with verified bytes. Raises `EntryLostError`; the entry is not found any more then."""
        ...

    def write(self, meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> None:
        """Keep an entry. Raises `OSError` when it could not be kept; nothing is left behind then."""
        ...

    def entries(self) -> Iterator[EntryMeta]:
        """What is there now, in no particular order; provenance may be missing."""
        ...

    def refresh(self) -> None:
        """Find what others have added or removed; called from time to time."""
        ...

    def clear(self) -> int:
        """Remove all entries; returns how many."""
        ...

    def check(self) -> list[str]:
        """Compare index and bytes; one sentence for each disagreement, none when all is well."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class SharedTier(Tier, Protocol):
    """A tier in which others keep entries without telling. What `find` does not find may be there all the same."""

    def is_known(self, key: bytes) -> bool:
        """Whether `find` is right about this key, as far as can be told without asking. A look-up, as `find` is."""
        ...

    def ask(self, metas: Sequence[EntryMeta]) -> None:
        """Learn whether these entries are there, for `find`. Raises nothing: without an answer they are not."""
        ...
