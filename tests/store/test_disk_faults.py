"""A folder that fails: full, read-only, removed, out of descriptors. Never an error but those of the interface."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from store.entries import blank, bytes_of, filled, meta_of, read_back, stored
from vlcache_connector.store.base import EntryLostError
from vlcache_connector.store.disk.tier import DiskTier

PLENTY = 10**9
TOKENS = 200  # 30 kB
NOBODY = 65534


def mounted(target: Path, *arguments: str) -> None:
    subprocess.run(["mount", *arguments, str(target)], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB that belongs to the test alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted(folder, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_it_has(small_disk: Path) -> None:
    tier = DiskTier(small_disk / "cache", PLENTY, world_size=2)
    kept, reasons = [], set()
    for seed in range(40):
        try:
            kept.append(stored(tier, seed, TOKENS, world_size=2))
        except OSError as error:
            reasons.add(error.errno)
    assert 5 < len(kept) < 40
    assert reasons == {errno.ENOSPC}
    assert {meta.key for meta in tier.entries()} == {meta.key for meta in kept}
    assert list((small_disk / "cache" / "tmp").iterdir()) == []
    assert tier.check(deep=True) == []
    assert all(read_back(tier, meta, 2) == bytes_of(filled(meta, 2)) for meta in kept)
    tier.clear()
    stored(tier, 50, TOKENS, world_size=2)


def test_a_file_may_not_grow(tmp_path: Path) -> None:
    """The same by a limit on the process, which needs no root."""
    tier = DiskTier(tmp_path, PLENTY, world_size=1)
    small = stored(tier, 1)
    with limit(resource.RLIMIT_FSIZE, 10_000), pytest.raises(OSError, match="too large"):
        stored(tier, 2, TOKENS)
    assert tier.find(meta_of(2).key) is None
    assert list((tmp_path / "tmp").iterdir()) == []
    assert read_back(tier, small) == bytes_of(filled(small))
    stored(tier, 2, TOKENS)
    assert tier.check(deep=True) == []


@contextmanager
def limit(what: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_a_read_only_folder_serves_and_takes_nothing(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = small_disk / "cache"
    before = DiskTier(root, PLENTY, world_size=1)
    metas = [stored(before, seed) for seed in range(4)]
    (damaged,) = root.glob(f"??/{metas[3].key.hex()}*")
    os.truncate(damaged, 100)
    capacity = before.nbytes
    mounted(small_disk, "-o", "remount,ro")
    for tier in (before, DiskTier(root, capacity, world_size=1)):
        assert read_back(tier, metas[0]) == bytes_of(filled(metas[0]))
        with pytest.raises(OSError, match="Read-only") as caught:
            stored(tier, 9)
        assert caught.value.errno == errno.EROFS
        for _ in range(2):  # not tried again, although it cannot be removed
            with pytest.raises(EntryLostError):
                read_back(tier, metas[3])
            tier.refresh()
            assert tier.find(metas[3].key) is None
        assert [tier.find(meta.key) for meta in metas[:3]] == [4] * 3
        assert tier.clear() == 0
        assert [tier.find(meta.key) for meta in metas[:3]] == [4] * 3
    assert len(caplog.records) == 2, "one line from each tier"
    mounted(small_disk, "-o", "remount,rw")
    stored(tier, 3)
    assert read_back(tier, metas[3]) == bytes_of(filled(metas[3]))
    assert tier.check(deep=True) == []


def test_a_start_on_a_read_only_folder_that_is_not_there_fails(small_disk: Path) -> None:
    mounted(small_disk, "-o", "remount,ro")
    with pytest.raises(OSError, match="Read-only"):
        DiskTier(small_disk / "cache", PLENTY, world_size=1)


@pytest.mark.parametrize("refreshed", [False, True])
def test_a_folder_removed_while_serving_comes_back_with_the_next_write(tmp_path: Path, refreshed: bool) -> None:
    root = tmp_path / "cache"
    tier = DiskTier(root, PLENTY, world_size=1)
    metas = [stored(tier, seed) for seed in range(4)]
    shutil.rmtree(root)
    if refreshed:
        tier.refresh()
        assert (len(tier), tier.nbytes) == (0, 0)
    for meta in metas:
        with pytest.raises(EntryLostError):
            read_back(tier, meta)
        assert tier.find(meta.key) is None
    tier.write(metas[0], filled(metas[0]))
    assert read_back(tier, metas[0]) == bytes_of(filled(metas[0]))
    assert tier.check(deep=True) == []
    assert tier.clear() == 1


def test_a_file_in_place_of_the_folder_breaks_nothing(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    tier = DiskTier(root, PLENTY, world_size=1)
    meta = stored(tier, 1)
    shutil.rmtree(root)
    root.write_bytes(b"")
    with pytest.raises(OSError, match="cache"):
        stored(tier, 2)
    with pytest.raises(EntryLostError):
        read_back(tier, meta)
    tier.refresh()
    assert (len(tier), tier.check(), tier.clear()) == (0, [], 0)


def test_without_descriptors_an_entry_is_only_overlooked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=1)
    meta = stored(tier, 1)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    with limit(resource.RLIMIT_NOFILE, lowest_free):
        with pytest.raises(EntryLostError):
            read_back(tier, meta)
        with pytest.raises(OSError, match="Too many open files"):
            stored(tier, 2)
        assert tier.find(meta.key) is None
    tier.refresh()
    assert read_back(tier, meta) == bytes_of(filled(meta))
    assert caplog.records == []


def test_a_folder_that_may_not_be_listed_keeps_its_entries_and_is_reported_once(tmp_path: Path) -> None:
    """By a process without root's powers, which reaches the folder because it is already in it."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    meta = stored(DiskTier(tmp_path, PLENTY, world_size=1), 1)
    (path,) = tmp_path.glob(f"??/{meta.key.hex()}*")
    for place in (tmp_path, tmp_path / "tmp", path.parent, path):
        os.chown(place, NOBODY, NOBODY)
    script = f"""
import os
from pathlib import Path
from vlcache_connector.store.disk.tier import DiskTier
os.setuid({NOBODY})
tier, folder = DiskTier(Path(), 10**9, 1), Path("{path.parent.name}")
for _ in range(2):
    folder.chmod(0)
    tier.refresh()
    tier.refresh()
    print(len(tier), len(tier.check()))
    folder.chmod(0o700)
    tier.refresh()
    print(len(tier), len(tier.check()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 1", "1 0"] * 2
    assert done.stderr.count("cannot see") == 2, done.stderr


def test_a_write_that_fails_late_leaves_the_entry_unknown(tmp_path: Path) -> None:
    """The file of the second rank cannot be put in its place."""
    tier = DiskTier(tmp_path, PLENTY, world_size=2)
    meta = stored(tier, 1, world_size=2)
    first, second = sorted(tmp_path.glob(f"??/{meta.key.hex()}*"))
    tier.clear()
    (second / "x").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        stored(tier, 1, world_size=2)
    assert not first.exists()
    assert (tier.find(meta.key), tier.nbytes) == (None, 0)
    with pytest.raises(EntryLostError):
        tier.read(meta, blank(meta, 2))
