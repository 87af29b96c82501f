"""A snapshot on disk: a folder with `entries/` in the disk tier's own format, `order` and `manifest.json`. No torch.

A snapshot is written to `TARGET.partial` and takes its place in one step when it is complete, so TARGET is always a
whole snapshot or none. Who writes holds a lock on the partial folder: without its writer it is litter, removed by the
next one.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vlcache_connector.errors import SnapshotError

FORMAT = 1
KEY_NBYTES = 32
UNBOUNDED = 1 << 62  # bytes: the image was bounded by the host tier
ENTRIES = "entries"
ORDER = "order"
MANIFEST = "manifest.json"
_MANIFEST_MAX_NBYTES = 1 << 16

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a complete snapshot says of itself."""

    world_size: int
    num_entries: int
    nbytes: int  # of all ranks' entries, without headers
    taken_at: str  # UTC, when the image was fixed
    seconds: float  # from then until it was complete
    version: str  # of this package
    facts: str = ""  # what the keys of its entries have in common: others have no use for it
    format: int = FORMAT


class PartialFolder:
    """A snapshot that is being written. Raises `SnapshotError` when another process writes to the same target, or when
    what is there is no snapshot: it would be removed in the end.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path = _partial(target)
        recover(target)
        _demand_ours(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(target)
        self._path.mkdir(mode=0o700)
        self._locks = [_locked(self._path)]
        if not self._path.exists():  # another process took it for litter before we had the lock
            raise SnapshotError(f"another process is writing a snapshot to {self._path}")
        self.entries = self._path / ENTRIES
        self.entries.mkdir()

    def complete(self, manifest: Manifest, keys: list[bytes]) -> None:
        """`keys`: of all entries, the least recently used first. The snapshot is at its target afterwards."""
        _write(self._path / ORDER, b"".join(reversed(keys)))
        _write(self._path / MANIFEST, json.dumps(asdict(manifest), indent=2).encode() + b"\n")
        _sync_folder(self._path)
        if self._target.exists():  # its name will be the partial folder's until it is removed
            self._locks.append(_locked(self._target))
        _put_in_place(self._path, self._target)
        _sync_folder(self._target.parent)
        self.remove()  # what is left under this name is the snapshot before

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        for lock in self._locks:
            os.close(lock)


def remove_partial(target: Path) -> None:
    """Remove what a writer left that did not come to an end. Raises `SnapshotError` when it is still writing."""
    path = _partial(target)
    _demand_ours(path)
    try:
        lock = _locked(path)
    except FileNotFoundError:
        return
    try:
        shutil.rmtree(path)
    finally:
        os.close(lock)


def recover(target: Path) -> None:
    """After a crash in the middle of the exchange in two steps: the old snapshot goes back to its place."""
    if not target.exists() and _old(target).exists():
        _old(target).rename(target)


def read_manifest(target: Path) -> Manifest:
    """Raises `SnapshotError` unless a complete snapshot of a format that we know is there."""
    recover(target)
    try:
        with (target / MANIFEST).open("rb") as file:
            content = json.loads(file.read(_MANIFEST_MAX_NBYTES))
        version = content.get("format")
        if version != FORMAT:
            raise SnapshotError(f"the snapshot {target} has format {version}, this version reads format {FORMAT}")
        manifest = Manifest(**content)
    except FileNotFoundError:
        raise SnapshotError(f"there is no snapshot at {target}: {MANIFEST} is missing") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{target / MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest.world_size, int) or not isinstance(manifest.num_entries, int):
        raise SnapshotError(f"{target / MANIFEST} holds no numbers of ranks and entries")
    return manifest


def read_keys(target: Path) -> Iterator[bytes]:
    """Keys of the snapshot's entries, the most recently used first."""
    with (target / ORDER).open("rb") as file:
        while len(key := file.read(KEY_NBYTES)) == KEY_NBYTES:
            yield key


def _demand_ours(folder: Path) -> None:
    """Raises `SnapshotError` for anything but a snapshot, a part of one, an empty folder, or nothing."""
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        names = set()
    except NotADirectoryError:
        raise SnapshotError(f"{folder} is not a folder") from None
    if names - {ENTRIES, ORDER, MANIFEST} or folder.is_symlink():
        raise SnapshotError(f"{folder} is no snapshot of ours, so it is left alone: choose another target")


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _old(target: Path) -> Path:
    return target.with_name(target.name + ".old")


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed, or the process has ended however."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SnapshotError(f"another process is writing a snapshot to {folder}") from None
    return descriptor


def _put_in_place(path: Path, target: Path) -> None:
    """Rename a folder to `target`; a folder that is there already is at `path` afterwards. Never a moment without."""
    if not target.exists():
        path.rename(target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not libc.renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE):
        return
    if (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(target))
    _exchange_in_two_steps(path, target)


def _exchange_in_two_steps(path: Path, target: Path) -> None:
    """For file systems that cannot do it in one. Whoever dies between the renames leaves work for `recover`."""
    _demand_ours(_old(target))
    shutil.rmtree(_old(target), ignore_errors=True)
    target.rename(_old(target))
    path.rename(target)
    _old(target).rename(path)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
