"""The shape of a policy."""

from collections.abc import Sequence
from typing import Protocol

from vlcache_connector.types import Run


class Policy(Protocol):
    """Chooses the tokens of one span that are recomputed, and what becomes of the others."""

    @property
    def name(self) -> str:
        """Value of the option `policy`; part of the namespace of approximate KV."""
        ...

    @property
    def shifts(self) -> bool:
        """Whether reused tokens follow the change that recomputation made to the chosen ones (`exec.shift`)."""
        ...

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        """Sorted, disjoint, non-empty runs of token offsets within a span of `length` tokens.

        `order`: some of its tokens, the first n of which stand for all as well as n can (`exec.content`); empty where
        nobody has looked.
        """
        ...
