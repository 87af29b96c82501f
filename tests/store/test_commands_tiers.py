"""Commands of a running cache that has tiers below the host tier: the disk tier, and any other."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from small_host import ENTRY_NBYTES, insert
from store.entries import EMBEDDING, files_of, key_of, stored
from store.live_scene import ABOUT
from vlcache_connector.store.base import EntryLostError, EntryMeta, Part, Tier
from vlcache_connector.store.commands import LiveCommands
from vlcache_connector.store.control.protocol import result_of
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.host import HostIndex


class Remote:
    """A tier of which only names are known."""

    name = "remote"

    def __init__(self) -> None:
        self._metas = {key_of(9): EntryMeta(key_of(9), 90, EMBEDDING)}

    def find(self, key: bytes) -> int | None:
        return self._metas[key].num_tokens if key in self._metas else None

    def read(self, meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> None:
        raise EntryLostError("it is far away")

    def write(self, meta: EntryMeta, ranks: Sequence[Sequence[Part]]) -> None:
        raise OSError("it is far away")

    def entries(self) -> Iterator[EntryMeta]:
        return iter(list(self._metas.values()))

    def refresh(self) -> None: ...

    def clear(self) -> int:
        count = len(self._metas)
        self._metas.clear()
        return count

    def check(self) -> list[str]:
        return ["it is far away"]

    def close(self) -> None: ...


def live(*tiers: Tier) -> LiveCommands:
    index = HostIndex(4 * ENTRY_NBYTES, LRU())
    insert(index, 0)
    return LiveCommands(index, threading.RLock(), tiers, lambda: ABOUT)


def test_all_tiers_are_listed_and_summed_up(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 30, 1)
    stored(disk, 0, 10, EMBEDDING)
    stored(disk, 1, 50, EMBEDDING)
    commands = live(disk, Remote())
    *entries, last = commands.list_entries(9, "tokens")
    listed = [(entry["entry"]["tier"], entry["entry"]["num_tokens"], entry["entry"]["nbytes"]) for entry in entries]
    sizes = {path.name[:64]: path.stat().st_size for path in files_of(tmp_path)}
    on_disk = [("disk", 50, sizes[key_of(1).hex()]), ("disk", 10, sizes[key_of(0).hex()])]
    assert listed == [("remote", 90, None), *on_disk, ("host", 1, ENTRY_NBYTES)]
    totals = {total["tier"]: (total["entries"], total["nbytes"]) for total in last["result"]["totals"]}
    assert totals == {"host": (1, ENTRY_NBYTES), "disk": (2, sum(sizes.values())), "remote": (1, 0)}
    tiers = {tier["name"]: tier for tier in commands.about()["tiers"]}
    assert (tiers["disk"]["entries"], tiers["disk"]["used_nbytes"]) == (2, sum(sizes.values()))
    assert tiers["disk"]["capacity_nbytes"] == 1 << 30
    assert (tiers["remote"]["entries"], tiers["remote"]["capacity_nbytes"]) == (1, None)


def test_clear_touches_the_tiers_that_are_named_only(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 30, 1)
    stored(disk, 0, 10, EMBEDDING)
    commands = live(disk, Remote())
    assert commands.clear(["disk"]) == {"disk": 1}
    assert files_of(tmp_path) == []
    assert [tier["entries"] for tier in commands.about()["tiers"]] == [1, 0, 1]
    assert commands.clear(["remote", "host"]) == {"remote": 1, "host": 1}


def test_clear_also_removes_what_another_engine_has_just_written(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 30, 1)
    stored(DiskTier(tmp_path, 1 << 30, 1), 0, 10, EMBEDDING)
    assert live(disk).clear(["disk"]) == {"disk": 1}
    assert files_of(tmp_path) == []


def test_check_names_the_tier_and_deep_reads_the_files(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 30, 1)
    stored(disk, 0, 10, EMBEDDING)
    (path,) = files_of(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert result_of(live(disk).check(False))["problems"] == []
    (problem,) = result_of(live(disk).check(True))["problems"]
    assert problem.startswith(f"disk: {path}: ")
    path.unlink()
    (problem,) = result_of(live(disk).check(False))["problems"]
    assert problem == f"disk: entry {key_of(0).hex()} is in the index, but has no file"
    assert result_of(live(Remote()).check(False))["problems"] == ["remote: it is far away"]
