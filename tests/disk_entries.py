"""Writes small entries into the folder of a disk tier, with the tier's own code."""

from pathlib import Path

from vlcache_connector.store.base import EntryMeta, Part
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.types import EntryClass

KV, EMBEDDING = EntryClass("kv", "image", "00112233aabbccdd"), EntryClass("embedding", "image")


def tier_of(root: Path, num_ranks: int = 1) -> DiskTier:
    return DiskTier(root, 1 << 30, num_ranks)


def write(tier: DiskTier, key: bytes, num_tokens: int, num_ranks: int = 1) -> None:
    """A KV entry for two or more ranks, an embedding for one."""
    buffer = memoryview(bytearray(key[:1] * num_tokens * 4))
    parts = [Part("embedding", "F16", (num_tokens, 2), buffer)]
    meta = EntryMeta(key, num_tokens, EMBEDDING)
    if num_ranks > 1:
        parts = [Part("layer.0", "F16", (2, num_tokens, 1, 1), buffer)]
        parts.append(Part("positions", "I32", (3, num_tokens), memoryview(bytearray(12 * num_tokens))))
        meta = EntryMeta(key, num_tokens, KV)
    tier.write(meta, [parts] * num_ranks)


def files_of(root: Path) -> list[Path]:
    return sorted(root.glob("??/*"))
