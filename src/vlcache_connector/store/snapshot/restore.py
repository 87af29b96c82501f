"""Reading a snapshot back, to warm the host tier at start-up. Runs in the scheduler's process, before it serves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlcache_connector.errors import SnapshotError
from vlcache_connector.store.base import EntryMeta
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.snapshot.folder import ENTRIES, UNBOUNDED, Manifest, read_keys, read_manifest


@dataclass(frozen=True, slots=True)
class SavedSnapshot:
    """A complete snapshot. Its entries are read from `tier`, which verifies every byte; close it afterwards."""

    manifest: Manifest
    tier: DiskTier
    target: Path

    def entries(self) -> Iterator[EntryMeta]:
        """The most recently used first, so that a host tier which is too small for all gets the best part."""
        there = {meta.key: meta for meta in self.tier.entries()}
        for key in read_keys(self.target):
            if (meta := there.pop(key, None)) is not None:
                yield meta


def open_snapshot(target: Path, world_size: int, facts: str = "") -> SavedSnapshot:
    """Raises `SnapshotError` when there is none, or none that an engine with so many ranks and these facts could
    use.
    """
    manifest = read_manifest(target)
    if manifest.world_size != world_size:
        raise SnapshotError(f"the snapshot {target} is of {manifest.world_size} ranks, this engine has {world_size}")
    if manifest.facts != facts:
        raise SnapshotError(f"the snapshot {target} was written with another model, other weights or other settings")
    try:
        return SavedSnapshot(manifest, DiskTier(target / ENTRIES, UNBOUNDED, world_size), target)
    except OSError as error:
        raise SnapshotError(f"the entries of the snapshot {target} cannot be listed: {error}") from error
