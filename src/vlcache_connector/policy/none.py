"""Recompute nothing within a span: naive position-independent reuse, the lower bound of the other policies."""

from collections.abc import Sequence

from vlcache_connector.policy.base import Policy
from vlcache_connector.types import Run


class NoRecompute(Policy):
    name = "none"

    def recompute(self, length: int, ratio: float, order: Sequence[int] = ()) -> tuple[Run, ...]:
        return ()
