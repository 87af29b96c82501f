"""Start-up and look-ups of a disk tier with many entries; `bench_disk.py` runs this."""

from __future__ import annotations

import os
import random
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from bench.results import say, table
from vlcache_connector.store.disk.folder import FileName
from vlcache_connector.store.disk.index import Record
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.types import EntryClass

KV = EntryClass("kv", "image")
PLENTY = 2**50


def start(folder: Path, num_entries: int) -> dict[str, Any]:
    """Seconds until a tier knows a folder of so many files; their inodes are in the kernel's caches."""
    root = folder / "start"
    say(f"disk: a folder of {num_entries} entries")
    DiskTier(root, PLENTY, 1).close()
    for i in range(256):
        (root / f"{i:02x}").mkdir()
    for _ in range(num_entries):
        name = FileName(os.urandom(32), 1600, KV, 0, 1)
        (root / name.folder / str(name)).touch()
    seconds, refreshes = [], []
    for _ in range(5):
        started = time.perf_counter()
        tier = DiskTier(root, PLENTY, 1)
        seconds.append(time.perf_counter() - started)
        if len(tier) != num_entries:
            raise RuntimeError(f"{len(tier)} entries found instead of {num_entries}")
        time.sleep(2.1)  # folders that have just changed would be listed once more
        tier.refresh()
        started = time.perf_counter()
        tier.refresh()
        refreshes.append(time.perf_counter() - started)
        tier.close()
    result = {
        "entries": num_entries,
        "seconds": statistics.median(seconds),
        "refresh_without_news_seconds": statistics.median(refreshes),
    }
    print(f"\nstart with {num_entries} entries: {result['seconds']:.2f} s (target for 100k: < 2 s)")
    print(f"refresh when nothing has changed: {1e3 * result['refresh_without_news_seconds']:.2f} ms\n", flush=True)
    return result


def look_ups(folder: Path, num_entries: int) -> dict[str, Any]:
    """Microseconds of single look-ups, hits and misses in random order, and memory of the index."""
    tier = DiskTier(folder / "look_up", PLENTY, 1)
    index = tier._catalog.index  # files for a million entries would prove nothing more
    say(f"disk: an index of {num_entries} entries")
    before = resident_nbytes()
    for i in range(num_entries):
        index.put(Record(os.urandom(32), 1000 + i % 1000, KV, 1, 1, 100_000_000 + i, written=time.time_ns()))
    nbytes = (resident_nbytes() - before) / num_entries
    present = [record.key for record in index.records()]
    keys = [*random.sample(present, min(100_000, num_entries)), *(os.urandom(32) for _ in range(100_000))]
    random.shuffle(keys)
    times = []
    for key in keys:
        started = time.perf_counter_ns()
        tier.find(key)
        times.append(time.perf_counter_ns() - started)
    percentiles = statistics.quantiles(times, n=1000)
    result = {
        "entries": num_entries,
        "median_us": percentiles[499] / 1e3,
        "p99_us": percentiles[989] / 1e3,
        "p99.9_us": percentiles[998] / 1e3,
        "bytes_per_entry": nbytes,
    }
    print("\nLook-ups, half of them hits, in microseconds (target: <= 50), and memory of the index")
    row = [f"{result[name]:.2f}" for name in ("median_us", "p99_us", "p99.9_us")]
    print(table(["entries", "median", "p99", "p99.9", "bytes per entry"], [[str(num_entries), *row, f"{nbytes:.0f}"]]))
    return result


def resident_nbytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
