"""The folder of a snapshot: it is whole or not there, and says what it is."""

import json
import threading
from pathlib import Path

import pytest

from vlcache_connector.errors import SnapshotError
from vlcache_connector.store.snapshot import folder
from vlcache_connector.store.snapshot.folder import Manifest, PartialFolder, read_keys, read_manifest, remove_partial
from vlcache_connector.store.snapshot.restore import open_snapshot

KEYS = [bytes([i]) * 32 for i in range(3)]


def manifest(num_entries: int = 3, world_size: int = 1) -> Manifest:
    return Manifest(world_size, num_entries, 100, "2026-01-01T00:00:00Z", 1.5, "0.1.0")


def complete(target: Path, num_entries: int = 3) -> None:
    PartialFolder(target).complete(manifest(num_entries), KEYS)


def test_a_complete_folder_tells_what_it_holds_the_last_key_first(tmp_path: Path) -> None:
    complete(tmp_path / "image")
    assert read_manifest(tmp_path / "image") == manifest()
    assert list(read_keys(tmp_path / "image")) == KEYS[::-1]


def test_there_is_never_a_moment_without_a_snapshot(tmp_path: Path) -> None:
    target = tmp_path / "image"
    complete(target, 0)
    seen, is_over = set(), threading.Event()

    def look() -> None:
        while not is_over.is_set():
            seen.add(json.loads((target / "manifest.json").read_bytes())["num_entries"] if target.exists() else None)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(1, 60):
        complete(target, number)
    is_over.set()
    reader.join()
    assert len(seen) > 5
    assert None not in seen
    assert {path.name for path in tmp_path.iterdir()} == {"image"}


def test_an_exchange_in_two_steps_ends_the_same_and_can_be_recovered_in_the_middle(tmp_path: Path) -> None:
    target, new = tmp_path / "image", tmp_path / "new"
    complete(target, 1)
    complete(new, 2)
    folder._exchange_in_two_steps(new, target)
    assert read_manifest(target).num_entries == 2
    assert read_manifest(new).num_entries == 1
    target.rename(tmp_path / "image.old")  # as far as it gets when it dies behind the first rename
    assert read_manifest(target).num_entries == 2
    assert {path.name for path in tmp_path.iterdir()} == {"image", "new"}


def test_litter_goes_but_not_what_is_being_written(tmp_path: Path) -> None:
    target = tmp_path / "image"
    (tmp_path / "image.partial" / "entries").mkdir(parents=True)
    busy = PartialFolder(target)
    with pytest.raises(SnapshotError, match="another process is writing"):
        remove_partial(target)
    with pytest.raises(SnapshotError, match="another process is writing"):
        PartialFolder(target)
    busy.remove()
    remove_partial(target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["image", "image.partial"])
def test_a_folder_that_holds_something_else_is_never_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").touch()
    with pytest.raises(SnapshotError, match="is no snapshot of ours"):
        PartialFolder(tmp_path / "image")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.txt")] == [Path(name) / "thesis.txt"]


def test_a_link_is_no_target(tmp_path: Path) -> None:
    complete(tmp_path / "elsewhere")
    (tmp_path / "image").symlink_to("elsewhere")
    with pytest.raises(SnapshotError, match="is no snapshot of ours"):
        PartialFolder(tmp_path / "image")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no snapshot"),
        (b"", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"{}", "has format None"),
        (b'{"format": 2}', "has format 2, this version reads format 1"),
        (b'{"format": 1}', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 60000, "cannot be read"),
    ],
)
def test_what_is_no_snapshot_is_not_opened(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    target = tmp_path / "image"
    target.mkdir()
    if content is not None:
        (target / "manifest.json").write_bytes(content)
    with pytest.raises(SnapshotError, match=sentence):
        open_snapshot(target, 1)


def test_a_snapshot_of_another_number_of_ranks_is_not_opened(tmp_path: Path) -> None:
    complete(tmp_path / "image")
    with pytest.raises(SnapshotError, match="is of 1 ranks, this engine has 2"):
        open_snapshot(tmp_path / "image", 2)
