"""Entries between a disk tier and shared memory, beside plain reads and writes; `bench_disk.py` runs this."""

from __future__ import annotations

import mmap
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from blake3 import blake3

from bench.interleaved import Ratio, ratio, times_in_turns
from bench.results import say, table
from vlcache_connector.store.base import EntryMeta, Part
from vlcache_connector.store.digests import PIECE_NBYTES, PieceHash
from vlcache_connector.store.disk.format import DTYPE_NBYTES
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.disk.workers import Workers
from vlcache_connector.types import EntryClass


@dataclass(frozen=True, slots=True)
class Case:
    """`entries` entries of a kind are moved in each turn."""

    name: str
    tokens: int
    layers: int  # 0: an embedding
    width: int  # numbers per token: of K or V of a layer, or of the embedding
    entries: int

    def shapes(self) -> list[tuple[str, str, tuple[int, ...]]]:
        if not self.layers:
            return [("embedding", "BF16", (self.tokens, self.width))]
        layers = [(f"layer.{i}", "BF16", (2, self.tokens, self.width // 64, 64)) for i in range(self.layers)]
        return [*layers, ("positions", "I32", (3, self.tokens))]


CASES = [
    Case("KV, 1600 tokens x 28 x 512", 1600, 28, 512, 4),
    Case("KV, 4096 tokens x 36 x 1024", 4096, 36, 1024, 1),
    Case("KV, 256 tokens x 12 x 128", 256, 12, 128, 64),
    Case("embedding, 1600 tokens x 3584", 1600, 0, 3584, 16),
]
QUICK_CASES = [Case("KV, 256 tokens x 28 x 512", 256, 28, 512, 2), CASES[3]]

# column -> (plain one, the one that is measured beside it)
SIDES = {
    "warm read": ("plain read", "read"),
    "by one thread": ("plain read", "read by one"),
    "cold read": ("plain cold", "cold"),
    "write": ("plain write", "write"),
}


@dataclass(frozen=True, slots=True)
class Entry:
    meta: EntryMeta
    parts: list[Part]

    @property
    def nbytes(self) -> int:
        return sum(len(part.buffer) for part in self.parts)

    def pieces(self) -> Iterator[memoryview]:
        for part in self.parts:
            for first in range(0, len(part.buffer), PIECE_NBYTES):
                yield part.buffer[first : first + PIECE_NBYTES]


def entries_of(case: Case) -> list[Entry]:
    """In shared memory, as the slabs of the workers are; each with other bytes."""
    kind = EntryClass("kv" if case.layers else "embedding", "image")
    entries = []
    for _ in range(case.entries):
        parts = []
        for name, dtype, shape in case.shapes():
            nbytes = prod(shape) * DTYPE_NBYTES[dtype]
            buffer = memoryview(mmap.mmap(-1, nbytes))
            buffer[:] = os.urandom(nbytes)
            parts.append(Part(name, dtype, shape, buffer))
        entries.append(Entry(EntryMeta(os.urandom(32), case.tokens, kind), parts))
    return entries


def plain_read(path: Path, entry: Entry) -> None:
    fd = os.open(path, os.O_RDONLY)
    at = os.fstat(fd).st_size - entry.nbytes
    for piece in entry.pieces():
        if os.preadv(fd, [piece], at) != len(piece):
            raise RuntimeError(f"{path} is shorter than it should be")
        at += len(piece)
    os.close(fd)


def plain_write(path: Path, entry: Entry) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for piece in entry.pieces():
        if os.write(fd, piece) != len(piece):
            raise RuntimeError(f"{path} could not be written")
    os.fsync(fd)
    os.close(fd)


def forget(paths: Sequence[Path]) -> None:
    """Out of the page cache; what was read before is clean, so it can be dropped."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(folder: Path, case: Case, repeats: int) -> dict[str, Any]:
    """Raises `RuntimeError` when an entry that was read is not the one that was written."""
    entries = entries_of(case)
    tier, alone = DiskTier(folder, 2**40, 1), DiskTier(folder, 2**40, 1, num_threads=1)

    def each(do: Callable[[Entry], object]) -> Callable[[], object]:
        return lambda: [do(entry) for entry in entries]

    writes = times_in_turns(
        {
            "plain write": each(lambda entry: plain_write(folder / entry.meta.key.hex(), entry)),
            "write": each(lambda entry: tier.write(entry.meta, [entry.parts])),
        },
        max(3, repeats // 3),
    )
    alone.refresh()
    paths = {entry.meta.key: next(folder.glob(f"??/{entry.meta.key.hex()}*")) for entry in entries}
    before = [blake3(part.buffer).digest() for entry in entries for part in entry.parts]
    warm = times_in_turns(
        {
            "plain read": each(lambda entry: plain_read(paths[entry.meta.key], entry)),
            "read": each(lambda entry: tier.read(entry.meta, [entry.parts])),
            "read by one": each(lambda entry: alone.read(entry.meta, [entry.parts])),
            "hash": each(lambda entry: list(map(PieceHash(entry.meta.key), entry.pieces()))),
        },
        repeats,
    )
    cold = times_in_turns(
        {
            "plain cold": each(lambda entry: plain_read(paths[entry.meta.key], entry)),
            "cold": each(lambda entry: tier.read(entry.meta, [entry.parts])),
        },
        max(3, repeats // 3),
        lambda: forget(list(paths.values())),
    )
    if before != [blake3(part.buffer).digest() for entry in entries for part in entry.parts]:
        raise RuntimeError(f"{case}: what was read is not what was written")
    tier.clear()
    times = {**writes, **warm, **cold}
    nbytes = sum(entry.nbytes for entry in entries)
    return {
        **asdict(case),
        "nbytes_of_an_entry": nbytes // len(entries),
        "gb_per_s": {name: nbytes / statistics.median(seconds) / 1e9 for name, seconds in times.items()},
        "plain_time_over_time": {name: asdict(ratio(times[a], times[b])) for name, (a, b) in SIDES.items()},
    }


def run(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Measures all cases and prints a table."""
    workers = Workers()
    workers.close()
    results = []
    for case in QUICK_CASES if quick else CASES:
        say(f"disk: {case.name}, {case.entries} entries")
        target = folder / case.name.replace(" ", "_")
        target.mkdir()
        results.append(measure(target, case, 5 if quick else 15))
    show(results, workers.num_threads)
    return {"threads": workers.num_threads, "cases": results}


def show(results: Sequence[dict[str, Any]], num_threads: int) -> None:
    rows = []
    for result in results:
        speeds = result["gb_per_s"]
        ratios = [str(Ratio(**result["plain_time_over_time"][side])) for side in SIDES]
        plain = [f"{speeds[name]:.2f}" for name in ("plain read", "hash", "plain cold", "plain write")]
        rows.append([result["name"], f"{result['nbytes_of_an_entry'] / 1e6:.1f}", *plain, *ratios])
    print(f"\nVerified reads by {num_threads} threads and durable writes, as a share of the plain ones' speed: median")
    print("(quartiles) of paired runs; more is better. The plain ones and hashing alone, by one thread, in GB/s")
    print(table(["entry", "MB", "plain read", "hashing", "plain cold read", "plain write", *SIDES], rows), flush=True)
