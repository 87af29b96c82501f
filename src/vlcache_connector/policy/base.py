"""The shape of a policy."""

from typing import Protocol

from vlcache_connector.types import Run


class Policy(Protocol):
    """Chooses the tokens of one span that are recomputed."""

    @property
    def name(self) -> str:
        """Value of the option `policy`; part of the namespace of approximate KV."""
        ...

    def recompute(self, length: int, ratio: float) -> tuple[Run, ...]:
        """Sorted, disjoint, non-empty runs of token offsets within a span of `length` tokens."""
        ...
