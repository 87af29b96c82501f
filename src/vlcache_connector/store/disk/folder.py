"""How files lie in the folder of a disk tier: their names, and the temporary files of writers.

    ROOT/ab/KEY.kv1600.image.0.0of1.safetensors     one rank's share of an entry
            KEY = ab...: 64 hex digits . kind and tokens . modality . tenant or 0 . rank of world
    ROOT/tmp/RANDOM                                 being written

A name holds what the index needs, so one listing makes an index. No text of a client becomes part of a name. Several
engines may share the folder. A writer keeps its files locked (flock) until all of them are in place: whoever gets that
lock knows that the writer is done or dead.
"""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from vlcache_connector.types import EntryClass

FILE_MODE = 0o600
FOLDER_MODE = 0o700
NUM_FOLDERS = 256

_NAME = re.compile(
    r"([0-9a-f]{64})\.(kv|embedding)([1-9][0-9]{0,8})\.([a-z_]{1,32})\.(0|[0-9a-f]{16})"
    r"\.(0|[1-9][0-9]{0,2})of([1-9][0-9]{0,2})\.safetensors"
)


class FileName(NamedTuple):
    """What the name of an entry's file says."""

    key: bytes
    num_tokens: int
    entry_class: EntryClass
    rank: int
    world_size: int

    @classmethod
    def parse(cls, text: str) -> "FileName | None":
        """None for a stray, a file that no tier has written."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        key, kind, num_tokens, modality, tenant, rank, world_size = match.groups()
        if int(rank) >= int(world_size):
            return None
        return cls(bytes.fromhex(key), int(num_tokens), _class_of(kind, modality, tenant), int(rank), int(world_size))

    def __str__(self) -> str:
        """Raises `ValueError` for what cannot be in a name."""
        kind, modality, tenant = self.entry_class.kind, self.entry_class.modality, self.entry_class.tenant or "0"
        shard = f"{self.rank}of{self.world_size}"
        text = f"{self.key.hex()}.{kind}{self.num_tokens}.{modality}.{tenant}.{shard}.safetensors"
        if self.parse(text) != self:
            raise ValueError(f"no entry's file can be called {text!r}")
        return text

    @property
    def folder(self) -> str:
        return f"{self.key[0]:02x}"


@lru_cache(1024)
def _class_of(kind: str, modality: str, tenant: str) -> EntryClass:
    """One object for all entries of a class: an index has many entries."""
    return EntryClass(kind, modality, "" if tenant == "0" else tenant)


class Found(NamedTuple):
    """A file that a listing came across."""

    name: FileName
    nbytes: int
    used: int  # when last, in nanoseconds: the file's time of access, which `DiskTier.read` sets
    written: int  # when, in nanoseconds: its time of modification
    inode: int


def list_folder(folder: Path) -> tuple[list[Found], list[str]]:
    """Files of entries, and the names of all else. Raises `OSError`, also for a link to a folder."""
    if not S_ISDIR(folder.lstat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
    found, strays = [], []
    with os.scandir(folder) as files:
        for file in files:
            name = FileName.parse(file.name)
            if name is None or name.folder != folder.name or not file.is_file(follow_symlinks=False):
                strays.append(file.name)
                continue
            try:
                status = file.stat(follow_symlinks=False)
            except FileNotFoundError:  # another engine has just removed it
                continue
            found.append(Found(name, status.st_size, status.st_atime_ns, status.st_mtime_ns, status.st_ino))
    return found, strays


class TemporaryFile:
    """A file that is being written, and whose writer lives."""

    def __init__(self, root: Path) -> None:
        """Raises `OSError`."""
        while True:
            self.path = root / "tmp" / secrets.token_hex(16)
            self.fd = self._create()
            with suppress(OSError):  # on a file system without locks nobody gets one, and nothing is ever cleaned up
                fcntl.flock(self.fd, fcntl.LOCK_EX)
            if os.fstat(self.fd).st_nlink:
                return
            os.close(self.fd)  # somebody cleaned up between the two calls

    def _create(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(self.path, flags, FILE_MODE)
        except FileNotFoundError:
            make_folder(self.path.parent)
            return os.open(self.path, flags, FILE_MODE)

    def move_to(self, path: Path) -> None:
        """Put the finished file in its place, and keep it locked. Raises `OSError`."""
        try:
            self.path.rename(path)
        except FileNotFoundError:
            make_folder(path.parent)
            self.path.rename(path)

    def close(self) -> None:
        """Give up the lock; the file is gone unless it was moved."""
        with suppress(OSError):
            self.path.unlink()
        os.close(self.fd)


def make_folder(folder: Path) -> None:
    """With all folders above it."""
    folder.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises `OSError`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file to read. Raises `OSError`, also for a symbolic link. Does not wait for the other end of a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def lock_of_writer(path: Path) -> Iterator[None]:
    """Holds the lock that a file's writer holds while it lives. Raises `OSError` when it cannot be had."""
    with opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_abandoned(path: Path) -> bool:
    """Whether nobody is writing a file any more."""
    with suppress(OSError), lock_of_writer(path):
        return True
    return False


def remove_abandoned(path: Path) -> None:
    """Remove a file unless somebody is writing it."""
    with suppress(OSError), lock_of_writer(path):
        path.unlink()  # under the lock: a writer that has only just created it will see that it is gone


def temporary_files(root: Path) -> list[Path]:
    """Files that writers make: others in a folder of this name are not ours."""
    try:
        return sorted(path for path in (root / "tmp").iterdir() if re.fullmatch("[0-9a-f]{32}", path.name))
    except OSError:
        return []
