"""Writers that die at any moment, and engines that share a folder: real processes on a real disk."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from store import disk_processes
from store.entries import bytes_of, filled, meta_of, read_back, stored
from vlcache_connector.store.disk.tier import DiskTier

TESTS = Path(__file__).parents[1]


def started(*arguments: object) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    return subprocess.Popen(
        [sys.executable, disk_processes.__file__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def counts_of(process: "subprocess.Popen[str]") -> dict[str, int]:
    out, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    counts: dict[str, int] = json.loads(out)
    return counts


def test_writers_killed_at_random_moments_leave_only_whole_entries(tmp_path: Path) -> None:
    counts = counts_of(started("killed", tmp_path, 300, 1))
    assert counts["rounds"] == 300
    assert counts["temporary files"] > 30, "they were killed while they wrote"
    assert counts["hits"] > 300


def test_engines_that_insert_and_evict_in_one_folder_agree_in_the_end(tmp_path: Path) -> None:
    processes = [started("shares", tmp_path, 300, seed) for seed in (1, 2)]
    for counts in map(counts_of, processes):
        assert min(counts.values()) > 10, counts
    tier = disk_processes.opened(tmp_path)
    assert tier.check(deep=True) == []
    assert list(tmp_path.glob("tmp/*")) == []
    there = [number for number in range(disk_processes.NUM_ENTRIES) if disk_processes.read(tier, number)]
    assert len(there) == len(tier) > 5


def test_threads_that_write_read_and_evict_at_once_agree_in_the_end(tmp_path: Path) -> None:
    tier = disk_processes.opened(tmp_path)

    def work(seed: int) -> int:
        found = 0
        for step in range(60):
            number = (7 * seed + step) % disk_processes.NUM_ENTRIES
            found += disk_processes.read(tier, number)
            disk_processes.write(tier, number)
            if step % 20 == 0:
                tier.refresh()
        return found

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert tier.check(deep=True) == []
    assert tier.evictions > 0
    tier.refresh()
    assert tier.check() == []


@pytest.mark.parametrize("seed", range(5))
def test_two_writers_of_one_entry_do_no_harm(tmp_path: Path, seed: int) -> None:
    one, other = DiskTier(tmp_path, 10**9, 2), DiskTier(tmp_path, 10**9, 2)
    meta = meta_of(seed)
    ready = Barrier(2)

    def write(tier: DiskTier) -> None:
        ready.wait()
        for _ in range(5):
            stored(tier, seed, world_size=2)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (one, other)))
    for tier in (one, other):
        assert read_back(tier, meta, 2) == bytes_of(filled(meta, 2))
        assert tier.check(deep=True) == []
