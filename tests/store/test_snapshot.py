"""Snapshots of a tier that goes on serving: what is in them, and what is left when one comes to no good end.

The other process, the files and the deaths are real.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from store import tier_of_pictures
from store.tier_of_pictures import Pictures, image_at, restored
from vlcache_connector.errors import SnapshotError
from vlcache_connector.store.host import HostEntry
from vlcache_connector.store.snapshot.folder import PartialFolder
from vlcache_connector.store.snapshot.writer import SnapshotState, SnapshotWriter

PATIENCE_S = 60


@contextmanager
def writing(tier: Pictures) -> Iterator[SnapshotWriter]:
    writer = tier.writer()
    try:
        yield writer
    finally:
        writer.close()
        tier.check()


def filled(num_entries: int = 48, num_tokens: int = 16, world_size: int = 1) -> Pictures:
    tier = Pictures(1 << 20, world_size)
    for number in range(num_entries):
        assert tier.insert(number, num_tokens) is not None
    return tier


def finish(writer: SnapshotWriter) -> SnapshotState:
    progress = writer.wait(PATIENCE_S)
    assert progress.state.is_over, progress
    return progress.state


def in_the_middle_of(writer: SnapshotWriter, target: Path) -> None:
    """Begin a snapshot that takes ever so long, and let it get somewhere."""
    writer.start(target, bytes_per_s=256 << 10)
    deadline = time.monotonic() + PATIENCE_S
    while writer.progress.written_entries < 2:
        assert not writer.progress.state.is_over and time.monotonic() < deadline, writer.progress
        time.sleep(0.001)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def gone(path: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not path.exists()


def dead(pid: int) -> bool:
    """Whether a process has let go of all that it held, its locks included; it may still wait for somebody to ask."""
    status, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if status.read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_snapshot_is_what_the_tier_holds_on_every_rank_most_recently_used_first(tmp_path: Path) -> None:
    tier = filled(num_entries=8, world_size=2)
    tier.use(3)
    with writing(tier) as writer:
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE
        progress = writer.progress
        assert (progress.written_entries, progress.written_nbytes) == (progress.num_entries, progress.nbytes)
        assert (progress.num_entries, progress.nbytes) == (8, 8 * 16 * 1024)
    found = list(restored(tmp_path / "image", world_size=2))
    assert [int.from_bytes(key) for key, _ in found] == [3, 7, 6, 5, 4, 2, 1, 0]
    for key, ranks in found:
        entry = tier.index.get(key)
        assert entry is not None
        assert ranks == [bytes(slab.view[entry.extent.offset :][: 16 * 1024]) for slab in tier.slabs]
    assert names_in(tmp_path) == {"image"}


@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_is_of_one_moment_whatever_happens_while_it_is_written(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    tier = Pictures(1 << 20)
    cleared = 0
    with writing(tier) as writer:
        for _ in range(3):
            for number in range(200):
                tier.insert(number, chance.choice([4, 8, 16, 32]))
            writer.start(tmp_path / "image", bytes_per_s=8 << 20)
            while not writer.progress.state.is_over:
                for _ in range(20):
                    tier.insert(chance.randrange(300), chance.choice([4, 8, 16, 32]))
                    tier.use(chance.randrange(300))
                if writer.progress.written_entries > 5 and chance.random() < 0.02:
                    with tier.lock:
                        tier.index.clear()
                    cleared += 1
                with tier.lock:
                    tier.index.check()
                time.sleep(0.0005)
            assert finish(writer) is SnapshotState.DONE
            assert image_at(tmp_path / "image") == tier.index.image
            assert len(tier.index.image) > 10
    assert tier.index.evictions > 20


def test_cancelling_leaves_nothing_but_the_snapshot_before(tmp_path: Path) -> None:
    tier = filled()
    with writing(tier) as writer:
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE
        before = tier.index.image
        tier.insert(100, 16)
        in_the_middle_of(writer, tmp_path / "image")
        assert names_in(tmp_path) == {"image", "image.partial"}
        writer.cancel()
        assert finish(writer) is SnapshotState.CANCELLED
        assert names_in(tmp_path) == {"image"}
        assert image_at(tmp_path / "image") == before
        tier.check()


def test_cancelling_does_not_wait_for_the_bandwidth_cap(tmp_path: Path) -> None:
    with writing(filled()) as writer:
        writer.start(tmp_path / "image", bytes_per_s=1)
        while not writer.progress.written_entries:
            writer.wait(0.01)
        writer.cancel()
        assert finish(writer) is SnapshotState.CANCELLED


def test_a_snapshot_can_be_cancelled_as_soon_as_it_was_asked_for_and_the_next_one_is_not(tmp_path: Path) -> None:
    tier = filled()
    with writing(tier) as writer:
        for _ in range(10):
            writer.start(tmp_path / "image", bytes_per_s=1)
            writer.cancel()
            assert finish(writer) is SnapshotState.CANCELLED
            assert names_in(tmp_path) == set()
            tier.check()
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE
        writer.cancel()  # too late, so it means nothing
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE


def test_two_at_once_are_refused_and_the_first_one_goes_on(tmp_path: Path) -> None:
    with writing(filled()) as writer:
        writer.start(tmp_path / "image", bytes_per_s=4 << 20)
        with pytest.raises(SnapshotError, match="wait for it or cancel it"):
            writer.start(tmp_path / "other")
        assert finish(writer) is SnapshotState.DONE
    assert names_in(tmp_path) == {"image"}


def test_a_target_that_another_engine_writes_to_is_left_alone(tmp_path: Path) -> None:
    theirs = PartialFolder(tmp_path / "image")
    with writing(filled()) as writer:
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.FAILED
        assert "another process is writing" in writer.progress.error
    assert theirs.entries.exists()


def test_a_snapshot_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    try:
        with writing(filled()) as writer:
            writer.start(disk / "image")
            assert finish(writer) is SnapshotState.FAILED
            assert "No space left" in writer.progress.error
            assert names_in(disk) == set()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_write_that_fails_ends_the_snapshot_and_not_the_next(tmp_path: Path) -> None:
    tier = filled()
    with writing(tier) as writer:
        _, hard = resource.prlimit(writer.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (1024, hard))
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.FAILED
        assert "File too large" in writer.progress.error
        assert names_in(tmp_path) == set()
        tier.check()
        resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (hard, hard))
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE


def test_a_target_that_cannot_be_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with writing(filled()) as writer:
        writer.start(tmp_path / "file" / "image")
        assert finish(writer) is SnapshotState.FAILED
        assert "file" in writer.progress.error


def test_an_entry_that_cannot_be_described_ends_the_snapshot_and_not_the_next(tmp_path: Path) -> None:
    tier = filled()
    describe, calls = tier.describe, iter(range(100))

    def stumbling(entry: HostEntry) -> object:
        if next(calls) == 20:
            raise ValueError("no idea")
        return describe(entry)

    tier.describe = stumbling  # type: ignore[assignment, method-assign]
    with writing(tier) as writer:
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.FAILED
        assert writer.progress.error == "no idea"
        tier.check()
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE
    assert names_in(tmp_path) == {"image"}


def test_when_the_writing_process_is_killed_the_snapshot_before_stays_and_the_next_one_works(tmp_path: Path) -> None:
    tier = filled()
    with writing(tier) as writer:
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE
        before = tier.index.image
        for _ in range(3):
            in_the_middle_of(writer, tmp_path / "image")
            os.kill(writer.pid, signal.SIGKILL)
            assert finish(writer) is SnapshotState.FAILED
            assert "status -9" in writer.progress.error
            assert names_in(tmp_path) == {"image"}
            assert image_at(tmp_path / "image") == before
            tier.check()
        tier.insert(100, 16)
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE
    assert image_at(tmp_path / "image") == tier.index.image != before


@pytest.mark.parametrize("both", [False, True], ids=["engine alone", "both"])
def test_when_the_engine_is_killed_the_snapshot_before_stays_and_the_litter_goes(tmp_path: Path, both: bool) -> None:
    tier = filled()
    with writing(tier) as writer:
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE
        before = tier.index.image
        engine = subprocess.Popen(
            [sys.executable, tier_of_pictures.__file__, tmp_path / "image"], stdout=subprocess.PIPE
        )
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
        if both:
            os.kill(pid, signal.SIGSTOP)
        engine.kill()
        engine.wait()
        engine.stdout.close()
        if both:
            os.kill(pid, signal.SIGKILL)
            assert dead(pid)
            assert (tmp_path / "image.partial").exists()
        else:
            assert gone(tmp_path / "image.partial")
        assert image_at(tmp_path / "image") == before
        tier.insert(100, 16)
        writer.start(tmp_path / "image")
        assert finish(writer) is SnapshotState.DONE, writer.progress
    assert names_in(tmp_path) == {"image"}
    assert image_at(tmp_path / "image") == tier.index.image != before
