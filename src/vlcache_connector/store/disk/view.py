"""The disk tier as the command line sees it: its folder, whether an engine runs on it or not. No torch.

Looking reads only. It is the folder that is listed: it knows what other engines wrote, and when entries were last used.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from vlcache_connector.store.control.protocol import ControlError, Message, NoCacheError
from vlcache_connector.store.disk import check as disk_check
from vlcache_connector.store.disk import folder as disk_folder
from vlcache_connector.store.disk.catalog import DiskCatalog
from vlcache_connector.store.disk.folder import NUM_FOLDERS, Found
from vlcache_connector.store.disk.index import Record, records_of
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.views import Row


class DiskView:
    """A folder of entries' files, and the tier that works on it in this process, if there is one."""

    name = DiskTier.name

    def __init__(self, root: Path, tier: DiskTier | None = None) -> None:
        """Raises `NoCacheError` for a folder in which there has never been a cache."""
        if tier is None and not _is_cache(root):
            raise NoCacheError(f"{root} is not the folder of a cache; give the one that the engine's disk_path names")
        self._root = root
        self._tier = tier

    def summary(self) -> Message:
        if self._tier is not None:
            entries, nbytes, capacity = len(self._tier), self._tier.nbytes, self._tier.capacity_nbytes
            return {"name": self.name, "capacity_nbytes": capacity, "used_nbytes": nbytes, "entries": entries}
        entries = nbytes = 0
        for _, found in self._folders():
            entries += len(records_of(found))
            nbytes += sum(file.nbytes for file in found)
        return {"name": self.name, "capacity_nbytes": None, "used_nbytes": nbytes, "entries": entries}

    def rows(self) -> Iterator[Row]:
        for _, found in self._folders():
            used = {file.name.key: file.used for file in sorted(found, key=lambda file: file.used)}
            yield from (self._row(record, used[key]) for key, record in records_of(found).items())

    def problems(self, deep: bool) -> Iterator[str | None]:
        if self._tier is not None:
            yield from (f"{self.name}: {problem}" for problem in self._tier.check())
        else:
            yield from (f"{self.name}: {problem}" for problem in disk_check.temporary_problems(self._root))
        for folder, found in self._folders():
            records = list(records_of(found).values())
            if self._tier is None:
                yield from (f"{self.name}: {problem}" for problem in disk_check.folder_problems(folder, records))
            for record in records:
                for name in record.file_names() if deep else ():
                    if problem := disk_check.file_problem(folder / str(name), name):
                        yield f"{self.name}: {problem}"
                yield None

    def clear(self) -> int:
        """Raises `ControlError` when files stay."""
        if self._tier is not None:
            self._tier.refresh()
            known, removed = len(self._tier), self._tier.clear()
        else:
            # A catalog also tidies up, and must not evict: what the capacity is, only the engine knows.
            catalog = DiskCatalog(self._root, sys.maxsize, LRU())
            known, removed = len(catalog.index), catalog.clear()
        if removed < known:
            raise ControlError(
                f"{known - removed} of {known} entries could not be removed; see who may write {self._root}"
            )
        return removed

    def _folders(self) -> Iterator[tuple[Path, list[Found]]]:
        for number in range(NUM_FOLDERS):
            folder = self._root / f"{number:02x}"
            try:
                yield folder, disk_folder.list_folder(folder)[0]
            except FileNotFoundError:
                continue

    def _row(self, record: Record, used_ns: int) -> Row:
        known = record.entry_class, record.num_tokens, record.nbytes
        return Row(self.name, record.key, *known, created_s=record.written / 1e9, used_s=used_ns / 1e9)


def _is_cache(root: Path) -> bool:
    """Whether a folder holds what a disk tier makes and nothing else. Many folders have a folder `tmp`, whose files are
    not ours to tidy up.
    """
    ours = {"tmp", *(f"{number:02x}" for number in range(NUM_FOLDERS))}
    try:
        names = {path.name for path in root.iterdir()} - {"lost+found"}
        strangers = set((root / "tmp").iterdir()) if "tmp" in names else set()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return bool(names) and names <= ours and strangers <= set(disk_folder.temporary_files(root))
