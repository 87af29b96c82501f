"""Scheduler side: the question by which a plan's tokens are chosen, and room for its KV.

A request that waits for its load has blocks for the covered range alone. The question runs before the engine computes
it, so blocks of the pool are lent for it until the load has ended; what it leaves there is nobody's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlcache_connector.engine.requests import RequestState
from vlcache_connector.types import Measure, ReusePlan, Run

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

MAX_TOKENS = 256
"""Of a question, the last ones."""


@dataclass(frozen=True, slots=True)
class Lent:
    """A question with `blocks` of the pool behind those of its request; no question where there is none, or no room."""

    question: Run | None = None
    blocks: Sequence[Any] = field(default_factory=tuple)

    @property
    def block_ids(self) -> list[int]:
        return [block.block_id for block in self.blocks]


def lend(state: RequestState, plan: ReusePlan, num_blocks: int, pool: "BlockPool", block_size: int) -> Lent:
    """For a request with `num_blocks` blocks. The question is the text behind the covered range, up to the next media
    item.
    """
    if plan.measure is not Measure.ATTENTION:
        return Lent()
    offsets = (feature.mm_position.offset for feature in state.request.mm_features)
    end = min((offset for offset in offsets if offset >= plan.end), default=state.request.num_prompt_tokens)
    wanted = max(0, -(-end // block_size) - num_blocks)
    if end <= plan.end or wanted > pool.get_num_free_blocks():
        return Lent()
    return Lent(Run(max(plan.end, end - MAX_TOKENS), end), pool.get_new_blocks(wanted))


@contextmanager
def lending(
    state: RequestState, plan: ReusePlan, num_blocks: int, pool: "BlockPool", block_size: int
) -> Iterator[Lent]:
    """`lend`, while a load is queued whose end gives the blocks back. If that raises there is no load, and they are
    given back here.
    """
    lent = lend(state, plan, num_blocks, pool, block_size)
    try:
        yield lent
    except BaseException:
        pool.free_blocks(lent.blocks)
        raise
