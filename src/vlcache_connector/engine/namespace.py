"""A hash namespace of their own for approximate blocks in vLLM's prefix cache (vLLM RFC #44223 asks for this).

The hash of the first block that may hold approximate KV is replaced by a salted one; all later hashes are chained
from it, also those of generated tokens. A request that did not agree to approximate KV computes unsalted hashes and
so can never be served such a block. The salt names the policy and ratio: requests under other settings have other
namespaces; the tenant is in the chain already, because vLLM hashes `cache_salt` into the first block.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlcache_connector.plan.keys import digest
from vlcache_connector.types import Ratio

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

_GROUPS = [0]  # engines with more than one KV cache group are declined


@dataclass(frozen=True, slots=True)
class Chain:
    """Where a request's block hashes leave the exact chain, and the hash that stood there."""

    first_block: int
    exact_hash: bytes


def salted(block_hash: bytes, policy: str, ratio: Ratio) -> bytes:
    """The hash of a block in the namespace of one policy and ratio, as wide as the original."""
    return digest(b"approximate", policy.encode(), repr(ratio).encode(), block_hash)[: len(block_hash)]


def enter(request: "Request", first_block: int, policy: str, ratio: Ratio) -> Chain | None:
    """Salt the chain from `first_block` on. None when the prompt fills no block at all: there is no hash to replace.

    When `first_block` itself is not full yet, the last full block is salted in its place, so that the block is chained
    from a salted hash once generated tokens have filled it.
    """
    hashes = request.block_hashes
    if not hashes:
        return None
    first_block = min(first_block, len(hashes) - 1)
    chain = Chain(first_block, hashes[first_block])
    _restart(request, first_block, salted(chain.exact_hash, policy, ratio))
    return chain


def leave(request: "Request", chain: Chain) -> None:
    """Back to the exact chain."""
    _restart(request, chain.first_block, chain.exact_hash)


def cached_chain_start(
    request: "Request", candidates: list[int], pool: "BlockPool", policy: str, ratio: Ratio
) -> int | None:
    """The candidate block from which this request's own namespace reaches further than the exact chain, if any."""
    for first_block in candidates:
        if first_block >= len(request.block_hashes):
            return None
        start_hash = salted(request.block_hashes[first_block], policy, ratio)
        if pool.get_cached_block(start_hash, _GROUPS) is None:
            continue  # one look-up per picture is all that most new requests cost
        exact = _num_cached(request.block_hashes, 0, pool)
        chain = enter(request, first_block, policy, ratio)
        assert chain is not None
        reached = _num_cached(request.block_hashes, first_block, pool)
        leave(request, chain)
        if first_block <= exact < reached:
            return first_block
    return None


def _num_cached(hashes: list, start: int, pool: "BlockPool") -> int:  # type: ignore[type-arg]
    """Index of the first block from `start` on that is not in the prefix cache."""
    for i in range(start, len(hashes)):
        if pool.get_cached_block(hashes[i], _GROUPS) is None:
            return i
    return len(hashes)


def _restart(request: "Request", first_block: int, block_hash: bytes) -> None:
    request.block_hashes[first_block] = block_hash
    del request.block_hashes[first_block + 1 :]
    request.update_block_hashes()
