"""Attention of passes that is not the engine's, over pages of another test's layouts."""

import random

import torch

from exec.test_pages import halves
from vlcache_connector.exec.attention import SparseQueryAttention
from vlcache_connector.exec.batch import Row, build_batch
from vlcache_connector.types import Run

BLOCK_SIZE, HEADS, DIM, NUM_BLOCKS = 16, 2, 64, 24
CPU = torch.device("cpu")


def test_what_stays_together_is_attended_to_alike_whatever_else_is_in_the_pass() -> None:
    """To the last bit: answers must not depend on which other requests and spans a step has room for."""
    generator = torch.Generator().manual_seed(0)
    layout = halves((BLOCK_SIZE, HEADS, DIM))
    cache = layout.allocate(NUM_BLOCKS, torch.float32).normal_(generator=generator)
    attend = SparseQueryAttention(layout.pages(cache))
    queries = torch.randn(400, 6 * HEADS, DIM, generator=generator)  # of each position, whichever request's

    def attention(rows: list[Row]) -> torch.Tensor:
        batch = build_batch(rows, [range(12), range(12, 24)], BLOCK_SIZE, CPU)
        out = torch.empty(batch.num_tokens, *queries.shape[1:])
        attend(queries[batch.positions], cache, batch, DIM**-0.5, 0.0, out)
        return out

    rng = random.Random(0)
    for _ in range(20):
        parts = [
            [Row(request, Run(at, at + 1), whole) for at in sorted(rng.sample(range(90 * whole, 90 * whole + 90), 19))]
            for request in range(2)
            for whole in range(2)
        ]
        together = attention([row for part in parts for row in part])
        assert torch.equal(together, torch.cat([attention(part) for part in parts]))
