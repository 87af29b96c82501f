"""What is wrong with the folder of a disk tier: one sentence for each finding. Reads, never repairs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vlcache_connector.store.base import EntryLostError
from vlcache_connector.store.disk import entry_file
from vlcache_connector.store.disk import folder as disk_folder
from vlcache_connector.store.disk.folder import FileName, is_abandoned
from vlcache_connector.store.disk.index import Record, records_of


def folder_problems(folder: Path, records: Sequence[Record]) -> Iterator[str]:
    """Where one folder and its part of the index disagree."""
    try:
        found, strays = disk_folder.list_folder(folder)
    except FileNotFoundError:
        found, strays = [], []
    except NotADirectoryError:
        found, strays = [], [""] if folder.parent.is_dir() else []
    except OSError as error:
        yield f"{folder} cannot be listed: {error.strerror}"
        return
    yield from (f"{folder / name} is not a file of this cache" for name in strays)
    listed = records_of(found)
    for record in records:
        key = record.key.hex()
        other = listed.pop(record.key, None)
        if other is None:
            yield f"entry {key} is in the index, but has no file"
        elif other != record:
            yield f"entry {key} is not in the index as it is in the folder: {_facts(record)}, {_facts(other)}"
        elif not record.is_complete:
            yield f"entry {key} lacks the files of {record.world_size - record.ranks.bit_count()} ranks"
    yield from (f"entry {key.hex()} is in the folder, but not in the index" for key in listed)
    names = {name for record in records_of(found).values() for name in record.file_names()}
    yield from (f"{folder / str(file.name)} contradicts another file" for file in found if file.name not in names)


def temporary_problems(root: Path) -> Iterator[str]:
    for path in disk_folder.temporary_files(root):
        if is_abandoned(path):
            yield f"{path} was left by a writer that died"


def file_problem(path: Path, name: FileName) -> str | None:
    """What is wrong with the bytes of one file; None also when it has gone in the meantime."""
    try:
        with disk_folder.opened(path) as fd:
            header = entry_file.verify(fd)
    except FileNotFoundError:
        return None
    except (EntryLostError, OSError) as error:
        return f"{path}: {error}"
    meta = header.meta
    if FileName(meta.key, meta.num_tokens, meta.entry_class, header.rank, header.world_size) != name:
        return f"{path}: its header and its name disagree"
    return None


def _facts(record: Record) -> str:
    return f"{record.num_tokens} tokens and {record.nbytes} bytes in {record.ranks.bit_count()} files"
