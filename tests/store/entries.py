"""Small entries for the tests of tiers: their bytes follow from a seed, so any process can tell what they must be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import sha256
from math import prod
from pathlib import Path

from vlcache_connector.store.base import EntryMeta, Part, Tier
from vlcache_connector.store.disk.format import DTYPE_NBYTES
from vlcache_connector.types import EntryClass, num_ordered

Ranks = list[list[Part]]

KV = EntryClass("kv", "image")
EMBEDDING = EntryClass("embedding", "image")
NUM_LAYERS = 3


def key_of(seed: int) -> bytes:
    return sha256(f"entry {seed}".encode()).digest()


def meta_of(seed: int, num_tokens: int = 4, entry_class: EntryClass = KV) -> EntryMeta:
    return EntryMeta(key_of(seed), num_tokens, entry_class, {"vllm": "0.32.0", "model": "a model"})


def shapes_of(meta: EntryMeta) -> list[tuple[str, str, tuple[int, ...]]]:
    tokens = meta.num_tokens
    if meta.entry_class.kind == "embedding":
        return [("embedding", "F32", (tokens, 6))]
    layers = ((f"layer.{i}", "BF16", (2, tokens, 2, 4)) for i in range(NUM_LAYERS))
    return [*layers, ("positions", "I32", (3, tokens)), ("order", "I32", (num_ordered(tokens),))]


def blank(meta: EntryMeta, world_size: int = 1) -> Ranks:
    """Parts to read an entry into."""

    def part(name: str, dtype: str, shape: tuple[int, ...]) -> Part:
        return Part(name, dtype, shape, memoryview(bytearray(prod(shape) * DTYPE_NBYTES[dtype])))

    return [[part(*shape) for shape in shapes_of(meta)] for _ in range(world_size)]


def filled(meta: EntryMeta, world_size: int = 1) -> Ranks:
    """Parts with the bytes that belong to an entry."""
    ranks = blank(meta, world_size)
    generator = random.Random(meta.key)
    for parts in ranks:
        for part in parts:
            part.buffer[:] = generator.randbytes(len(part.buffer))
    return ranks


def bytes_of(ranks: Sequence[Sequence[Part]]) -> list[list[bytes]]:
    return [[bytes(part.buffer) for part in parts] for parts in ranks]


def read_back(tier: Tier, meta: EntryMeta, world_size: int = 1) -> list[list[bytes]]:
    ranks = blank(meta, world_size)
    tier.read(meta, ranks)
    return bytes_of(ranks)


def stored(tier: Tier, seed: int, num_tokens: int = 4, entry_class: EntryClass = KV, world_size: int = 1) -> EntryMeta:
    """An entry that has been written."""
    meta = meta_of(seed, num_tokens, entry_class)
    tier.write(meta, filled(meta, world_size))
    return meta


def files_of(root: Path) -> list[Path]:
    """Of the entries in the folder of a disk tier."""
    return sorted(root.glob("??/*"))
