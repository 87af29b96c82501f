"""When a request's block hashes leave the exact chain, and when they come back: see `namespace` for why."""

from typing import TYPE_CHECKING

from vlcache_connector.engine import namespace
from vlcache_connector.engine.requests import RequestState
from vlcache_connector.types import ReusePlan

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


class Chains:
    """Keeps the chain of each request in step with its plan. `has_prefix_cache` False: hashes are never looked at."""

    def __init__(self, block_size: int, has_prefix_cache: bool) -> None:
        self._block_size = block_size
        self._has_prefix_cache = has_prefix_cache

    def resume(self, state: RequestState, pool: "BlockPool") -> None:
        """Continue on this conversation's own approximate blocks where they reach further than exact ones."""
        if not self._has_prefix_cache or not state.spans:
            return
        candidates = sorted({span.offset // self._block_size for span in state.spans})
        settings = state.namespace
        start = namespace.cached_chain_start(state.request, candidates, pool, *settings)
        if start is not None:
            state.chain = namespace.enter(state.request, start, *settings)

    def enter(self, state: RequestState, num_local: int) -> bool:
        """Put the blocks of the plan into the approximate namespace; False when that is impossible."""
        assert isinstance(state.plan, ReusePlan)
        self.leave_unused(state, num_local)
        first_reused = state.plan.first_reused
        if state.chain is not None or first_reused is None or not self._has_prefix_cache:
            return True
        span = next(part.span for part in state.plan.spans if part.reused)
        first_block = max(span.offset, num_local) // self._block_size
        state.chain = namespace.enter(state.request, first_block, *state.namespace)
        return state.chain is not None

    def leave_unused(self, state: RequestState, num_local: int) -> None:
        """Back to the exact chain, unless the local hit reaches into the approximate namespace."""
        if self.is_used(state, num_local):
            state.is_approximate = True
        elif state.chain is not None:
            namespace.leave(state.request, state.chain)
            state.chain = None

    def is_used(self, state: RequestState, num_local: int) -> bool:
        return state.chain is not None and num_local > state.chain.first_block * self._block_size
