"""The remote tier over a healthy store: lmcache's file system adapter, which is always there, and Redis."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redis_server import needs_redis, running
from store.entries import EMBEDDING, blank, bytes_of, filled, key_of, meta_of, read_back, stored
from store.remote_tiers import Counts, needs_lmcache, remote_tier, resp
from vlcache_connector.store.base import EntryLostError, EntryMeta, Part, SharedTier
from vlcache_connector.store.commands import LiveCommands
from vlcache_connector.store.control.protocol import result_of
from vlcache_connector.store.digests import PIECE_NBYTES
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.store.eviction.policies import LRU
from vlcache_connector.store.host import HostIndex
from vlcache_connector.store.remote.blob import BLOB_NBYTES
from vlcache_connector.store.remote.tier import BLOBS_AT_ONCE, RemoteTier
from vlcache_connector.types import EntryClass

pytestmark = [needs_lmcache, pytest.mark.usefixtures("closing")]
MakeTier = Callable[..., RemoteTier]


@pytest.fixture(params=["fs_native", pytest.param("resp", marks=needs_redis)])
def description(request: Any, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Of one store; all tiers of a test share it."""
    if request.param == "fs_native":
        yield {"type": "fs_native", "base_path": str(tmp_path / "store"), "num_workers": 2}
    else:
        with running(tmp_path) as server:
            yield resp(server.port)


@pytest.fixture
def make_tier(description: dict[str, Any]) -> MakeTier:
    def make(world_size: int = 1, counts: Counts | None = None) -> RemoteTier:
        return remote_tier(description, counts, world_size)

    return make


def test_it_is_a_shared_tier_and_the_disk_tier_is_none(make_tier: MakeTier, tmp_path: Path) -> None:
    assert isinstance(make_tier(), SharedTier)
    assert not isinstance(DiskTier(tmp_path / "disk", 1 << 20, 1), SharedTier)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_what_one_engine_wrote_another_reads(make_tier: MakeTier, world_size: int) -> None:
    one, other = make_tier(world_size), make_tier(world_size)
    metas = [stored(one, seed, num_tokens=seed + 1, world_size=world_size) for seed in range(5)]
    assert [one.find(meta.key) for meta in metas] == [1, 2, 3, 4, 5]
    assert [other.find(meta.key) for meta in metas] == [None] * 5 and not other.is_known(metas[0].key)
    other.ask(metas)
    assert [other.find(meta.key) for meta in metas] == [1, 2, 3, 4, 5]
    for meta in metas:
        assert read_back(other, replace(meta, provenance={"written by": "another version"}), world_size) == bytes_of(
            filled(meta, world_size)
        )


def test_asking_tells_what_is_there_from_what_is_not(make_tier: MakeTier) -> None:
    counts = Counts()
    stored(make_tier(), 1)
    tier = make_tier(counts=counts)
    tier.ask([meta_of(0), meta_of(1), meta_of(2)])
    assert [tier.find(key_of(seed)) for seed in range(3)] == [None, 4, None]
    assert all(tier.is_known(key_of(seed)) for seed in range(3)) and not tier.is_known(key_of(3))
    assert counts == {"asked_entries:remote_hit": 1, "asked_entries:remote_miss": 2}


@pytest.mark.parametrize(
    "nbytes",
    [1, PIECE_NBYTES + 1, BLOB_NBYTES, 2 * BLOB_NBYTES + 17, BLOBS_AT_ONCE * BLOB_NBYTES + PIECE_NBYTES],
)
def test_entries_of_any_size(make_tier: MakeTier, nbytes: int) -> None:
    meta = EntryMeta(key_of(1), 1, EMBEDDING)
    parts = [Part(f"part.{i}", "U8", (nbytes,), memoryview(bytearray(os.urandom(nbytes)))) for i in range(2)]
    make_tier().write(meta, [parts])
    into = [Part(part.name, "U8", (nbytes,), memoryview(bytearray(nbytes))) for part in parts]
    make_tier().read(meta, [into])
    assert bytes_of([into]) == bytes_of([parts])


def test_an_embedding_is_one_entry_whatever_the_number_of_ranks(make_tier: MakeTier) -> None:
    meta = stored(make_tier(2), 1, entry_class=EMBEDDING)
    tier = make_tier(8)
    tier.ask([meta])
    assert tier.find(meta.key) == 4 and read_back(tier, meta) == bytes_of(filled(meta))


def test_kv_of_another_number_of_ranks_is_not_there(make_tier: MakeTier) -> None:
    meta, tier = stored(make_tier(2), 1, world_size=2), make_tier(4)
    tier.ask([meta])
    assert tier.find(meta.key) is None


def test_what_was_not_written_is_lost(make_tier: MakeTier) -> None:
    with pytest.raises(EntryLostError, match="gone"):
        make_tier().read(meta_of(1), blank(meta_of(1)))


@pytest.mark.parametrize(
    "wanted",
    [
        meta_of(1, num_tokens=5),
        meta_of(1, entry_class=EntryClass("kv", "image", "0123456789abcdef")),
        meta_of(1, entry_class=EMBEDDING),
    ],
)
def test_an_entry_that_is_not_the_one_that_is_wanted_is_lost(make_tier: MakeTier, wanted: EntryMeta) -> None:
    stored(make_tier(), 1)
    tier = make_tier()
    with pytest.raises(EntryLostError):
        tier.read(wanted, blank(wanted))
    assert tier.find(wanted.key) is None


def test_clear_removes_what_the_engine_knows_of(make_tier: MakeTier) -> None:
    one, other = make_tier(2), make_tier(2)
    metas = [stored(one, seed, world_size=2) for seed in range(3)]
    assert sorted(meta.key for meta in one.entries()) == sorted(meta.key for meta in metas)
    assert one.clear() == 3 and list(one.entries()) == []
    other.ask(metas)
    assert [other.find(meta.key) for meta in metas] == [None] * 3
    assert other.clear() == 0


def test_the_commands_of_a_running_cache_know_what_the_engine_knows(make_tier: MakeTier) -> None:
    tier = make_tier()
    stored(make_tier(), 1)
    meta = stored(tier, 2, num_tokens=9)
    commands = LiveCommands(HostIndex(1 << 20, LRU()), threading.RLock(), [tier], dict)
    *entries, last = commands.list_entries(9, "tokens")
    assert [(entry["entry"]["key"], entry["entry"]["num_tokens"]) for entry in entries] == [(meta.key.hex(), 9)]
    assert [total["tier"] for total in last["result"]["totals"]] == ["remote"]
    assert result_of(commands.check(True))["problems"] == []
    assert commands.clear(["host", "remote"]) == {"host": 0, "remote": 1}
    tier.ask([meta_of(1), meta])
    assert [tier.find(key_of(1)), tier.find(key_of(2))] == [4, None]
