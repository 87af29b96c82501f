"""What other processes do in the tests of the disk tier. No torch, so that they start and fork fast.

    python disk_processes.py killed FOLDER ROUNDS SEED    writers that are killed at random moments
    python disk_processes.py shares FOLDER STEPS SEED     one engine of several on a folder

Prints counts as JSON, or fails with an `AssertionError`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from store.entries import EMBEDDING, KV, blank, bytes_of, filled, meta_of
from vlcache_connector.store.base import EntryLostError, EntryMeta
from vlcache_connector.store.disk.tier import DiskTier

CAPACITY = 60_000
NUM_ENTRIES = 40


def entry(number: int) -> tuple[EntryMeta, int]:
    """One of the entries that all these processes write, and how many ranks it has."""
    embedding = number % 3 == 0
    return meta_of(number, 1 + number % 30, EMBEDDING if embedding else KV), 1 if embedding else 2


def opened(root: Path) -> DiskTier:
    return DiskTier(root, CAPACITY, world_size=2)


def write(tier: DiskTier, number: int) -> None:
    meta, world_size = entry(number)
    tier.write(meta, filled(meta, world_size))


def read(tier: DiskTier, number: int) -> bool:
    """Whether it was there. Raises `AssertionError` when it was not what had been written."""
    meta, world_size = entry(number)
    if tier.find(meta.key) is None:
        return False
    into = blank(meta, world_size)
    try:
        tier.read(meta, into)
    except EntryLostError:
        return False
    assert bytes_of(into) == bytes_of(filled(meta, world_size)), f"entry {number} has other bytes"
    return True


def killed(root: Path, rounds: int, seed: int) -> dict[str, int]:
    """Fork a writer, kill it, open the folder as after a restart and look at all there is; again and again."""
    generator = random.Random(seed)
    counts = {"rounds": 0, "temporary files": 0, "half entries": 0, "hits": 0}
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            tier = opened(root)
            while True:
                write(tier, generator.randrange(NUM_ENTRIES))
        time.sleep(generator.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the writer ended by itself"
        generator.random()  # the next writer does something else
        shards = [path.name.rsplit(".", 2)[0] for path in root.glob("??/*of2.*")]
        counts["temporary files"] += len(list(root.glob("tmp/*")))
        counts["half entries"] += sum(shards.count(shard) == 1 for shard in shards)
        tier = opened(root)
        found = [number for number in range(NUM_ENTRIES) if tier.find(entry(number)[0].key) is not None]
        assert all(read(tier, number) for number in found), "what was found could not be read"
        assert tier.check(deep=True) == []
        assert list(root.glob("tmp/*")) == []
        tier.close()  # its threads as well: this process forks again
        counts["hits"] += len(found)
        counts["rounds"] += 1
    return counts


def shares(root: Path, steps: int, seed: int) -> dict[str, int]:
    """Insert, look up, evict and refresh while others do the same."""
    generator = random.Random(seed)
    tier = opened(root)
    counts = {"hits": 0, "misses": 0, "written": 0}
    for _ in range(steps):
        number = generator.randrange(NUM_ENTRIES)
        if generator.random() < 0.1:
            tier.refresh()
        if read(tier, number):
            counts["hits"] += 1
        else:
            counts["misses"] += 1
            write(tier, number)
            counts["written"] += 1
    return {**counts, "evictions": tier.evictions}


if __name__ == "__main__":
    task, folder, *numbers = sys.argv[1:]
    tasks = {"killed": killed, "shares": shares}
    print(json.dumps(tasks[task](Path(folder), *map(int, numbers))))
