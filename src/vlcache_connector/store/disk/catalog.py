"""Index and file names of a disk tier, changed together under one lock. What is in the files is not looked at.

The catalog is right about what this engine did, and learns by `refresh` what others did in the same folder.
"""

import errno
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from vlcache_connector.store.disk import check as disk_check
from vlcache_connector.store.disk import folder as disk_folder
from vlcache_connector.store.disk.folder import NUM_FOLDERS, FileName, Found, TemporaryFile
from vlcache_connector.store.disk.index import DiskIndex, Record
from vlcache_connector.store.eviction.limits import Limits
from vlcache_connector.store.eviction.order import EvictionOrder
from vlcache_connector.store.eviction.policies import EvictionPolicy
from vlcache_connector.types import EntryClass

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, so its handlers and level apply

GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
SETTLED_NS = 2 * 10**9  # a folder that has not changed for so long will show the next change in its time
NEVER = -1


class DiskCatalog:
    """`index` may be looked into at any time, from any thread; it is changed here only."""

    def __init__(self, root: Path, capacity_nbytes: int, policy: EvictionPolicy, limits: Limits | None = None) -> None:
        """Lists the folder. Raises `OSError` when there is none and it cannot be made."""
        self.root = root
        self.index = DiskIndex(EvictionOrder(policy, capacity_nbytes, limits))
        self.evictions = 0
        self.capacity_nbytes = capacity_nbytes
        self._reserved_nbytes = 0  # of files that are being written
        self._lock = Lock()
        self._listed = [NEVER] * NUM_FOLDERS  # each folder's time of modification when it was listed
        self._halves: list[Record] = []  # entries without the files of all ranks
        self._refused: dict[FileName, tuple[int, int]] = {}  # lost files that would not go: modification, inode
        self._unlistable: set[int] = set()  # numbers of folders
        disk_folder.make_folder(root / "tmp")
        with self._lock:
            self._list(range(NUM_FOLDERS))  # at once: last uses are compared across folders
        self._tidy()

    def path(self, name: FileName) -> Path:
        return self.root / name.folder / str(name)

    def touch(self, record: Record) -> None:
        """The entry was used."""
        with self._lock:
            self.index.touch(record)

    @contextmanager
    def room_for(self, nbytes: int, entry_class: EntryClass) -> Iterator[None]:
        """Evicts others as needed, and keeps the room for files that are being written.

        Raises `OSError` when there cannot be so much room, or a file to be evicted stays.
        """
        with self._lock:
            self._evict_for(nbytes, entry_class)
            self._reserved_nbytes += nbytes
        try:
            yield
        finally:
            with self._lock:
                self._reserved_nbytes -= nbytes

    def place(self, record: Record, files: Sequence[TemporaryFile]) -> None:
        """Put the written files of all ranks in their places. Raises `OSError`; none is in its place then."""
        names = list(record.file_names())
        with self._lock:
            known = self.index.get(record.key)
            if known is not None:
                self.index.remove(known)
                self._unlink_all(set(known.file_names()).difference(names))
            try:
                for name, file in zip(names, files, strict=True):
                    file.move_to(self.path(name))
                    self._refused.pop(name, None)
            except OSError:
                self._unlink_all(names)
                raise
            self.index.put(record)
            self._listed[record.key[0]] = NEVER  # its folder may be new

    def lose(self, record: Record) -> bool:
        """Remove an entry that cannot be read; returns False when it had already left the index."""
        with self._lock:
            if not self.index.remove(record):
                return False
            self._unlink_all(record.file_names())
            return True

    def overlook(self, record: Record) -> None:
        """Forget an entry until the next `refresh`."""
        with self._lock:
            self.index.remove(record)
            self._listed[record.key[0]] = NEVER

    def clear(self) -> int:
        """Remove all entries that are known, and what dead writers left; returns the number of entries that went."""
        removed = 0
        for record in self.index.records():
            with self._lock, suppress(OSError):
                self._unlink(record.file_names())
                removed += self.index.remove(record)
        self._tidy()
        return removed

    def refresh(self) -> None:
        """Learn what other engines did. When they did nothing, it looks at the times of the folders only."""
        for number in range(NUM_FOLDERS):
            with self._lock:
                if self._listed[number] != self._time_of(number):
                    self._list([number])
        self._tidy()

    def problems(self) -> Iterator[str]:
        """Where index and folder disagree, and what should not be there."""
        for number in range(NUM_FOLDERS):
            with self._lock:
                yield from list(disk_check.folder_problems(self._folder(number), self.index.folder(number)))
        yield from disk_check.temporary_problems(self.root)
        with self._lock:
            counted, nbytes = self.index.nbytes, sum(record.nbytes for record in self.index.records())
        if counted != nbytes:
            yield f"the index counts {counted} bytes, its entries have {nbytes}"
        if nbytes > self.capacity_nbytes:
            yield f"the files have {nbytes} bytes, {self.capacity_nbytes} are allowed"

    def _folder(self, number: int) -> Path:
        return self.root / f"{number:02x}"

    def _time_of(self, number: int) -> int:
        """When names in a folder last changed; 0 when there is no such folder."""
        try:
            return self._folder(number).lstat().st_mtime_ns
        except OSError:
            return 0

    # -- what follows is called with the lock held, up to _tidy -------------------------------------------------------

    def _list(self, numbers: Iterable[int]) -> None:
        listed, found = [], list[Found]()
        for number in numbers:
            changed = self._time_of(number)
            try:
                found += disk_folder.list_folder(self._folder(number))[0]
            except OSError as error:
                if error.errno not in GONE:
                    self._complain(number, error)
                    continue
            listed.append(number)
            self._unlistable.discard(number)
            self._listed[number] = changed if time.time_ns() - changed > SETTLED_NS else NEVER
        known = [file for file in found if self._refused.get(file.name) != (file.written, file.inode)]
        self._halves += self.index.take_over(listed, known)

    def _complain(self, number: int, error: OSError) -> None:
        if not self._unlistable:  # once, until all folders can be listed again
            logger.warning("The disk tier cannot see what is new in its folder: %s", error)
        self._unlistable.add(number)

    def _evict_for(self, nbytes: int, entry_class: EntryClass | None = None) -> None:
        room = self.capacity_nbytes - self._reserved_nbytes - nbytes
        is_admitted = entry_class is None or self.index.order.admits(nbytes, entry_class)
        if room < 0 or not is_admitted:
            raise OSError(errno.ENOSPC, f"no room for {nbytes} bytes in a disk tier of {self.capacity_nbytes}")
        for record in self.index.leavers(nbytes, entry_class, room):
            self._unlink(record.file_names())
            self.index.remove(record)
            self.evictions += 1

    def _unlink(self, names: Iterable[FileName]) -> None:
        """Raises `OSError` when a file stays."""
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                self.path(name).unlink()

    def _unlink_all(self, names: Iterable[FileName]) -> None:
        """Files that stay, because the folder is read-only for example, are not looked at again."""
        for name in names:
            try:
                self._unlink([name])
            except OSError:
                with suppress(OSError):
                    status = self.path(name).lstat()
                    self._refused[name] = (status.st_mtime_ns, status.st_ino)

    def _tidy(self) -> None:
        """Remove what dead writers left, and what is beyond the capacity."""
        for path in disk_folder.temporary_files(self.root):
            disk_folder.remove_abandoned(path)
        with self._lock:
            halves = [half for half in self._halves if self.index.get(half.key) is half]
            self._halves = [half for half in halves if not self._remove_half(half)]
            with suppress(OSError):
                self._evict_for(0)

    def _remove_half(self, half: Record) -> bool:
        """Unless the other files may still come. Returns whether it was removed."""
        if not all(disk_folder.is_abandoned(self.path(name)) for name in half.file_names()):
            return False
        with suppress(OSError):
            self._unlink(half.file_names())
            return self.index.remove(half)
        return False
