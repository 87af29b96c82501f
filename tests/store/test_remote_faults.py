"""The remote tier and a Redis server that dies, restarts, stands still, is full, or gives back other bytes."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from redis_server import RedisServer, Road, free_port, needs_redis, running
from store.entries import EMBEDDING, blank, bytes_of, filled, meta_of, read_back, stored
from store.remote_tiers import Counts, needs_lmcache, remote_tier, resp
from vlcache_connector.store.base import EntryLostError, EntryMeta
from vlcache_connector.store.control.protocol import ControlError
from vlcache_connector.store.remote.tier import RemoteTier
from vlcache_connector.types import EntryClass

pytestmark = [needs_lmcache, needs_redis, pytest.mark.usefixtures("closing")]
SHORT_S = 0.5  # a time-out that is meant to happen


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as server:
        yield server


@pytest.fixture
def road(server: RedisServer) -> Iterator[Road]:
    road = Road(server.port)
    yield road
    road.close()


@pytest.fixture
def counts() -> Counts:
    return Counts()


def is_there(tier: RemoteTier, meta: EntryMeta) -> bool:
    """What the tier believes, once it has asked."""
    tier._presence.clear()
    tier.ask([meta])
    return tier.find(meta.key) is not None


def blob_of(server: RedisServer, meta: EntryMeta, rank: int = 0) -> bytes:
    """Name of its first blob."""
    (name,) = (key for key in server.blobs() if meta.key.hex().encode() in key and b"%04x@" % rank in key)
    return name


def test_entries_survive_a_restart_of_the_server_and_the_engine_goes_on(server: RedisServer, counts: Counts) -> None:
    tier = remote_tier(resp(server.port), counts)
    meta = stored(tier, 1)
    server.stop()
    server.start()
    assert is_there(tier, meta) and read_back(tier, meta) == bytes_of(filled(meta))
    assert not tier.is_given_up and counts["tier_breaker:remote_opened"] == 0
    other = stored(tier, 2)
    assert read_back(remote_tier(resp(server.port)), other) == bytes_of(filled(other)), "another client reads it"


@pytest.mark.parametrize("operation", ["ask", "read", "write"])
def test_cut_connections_cost_nothing_but_a_new_one(
    server: RedisServer, road: Road, counts: Counts, operation: str
) -> None:
    tier = remote_tier(resp(road.port), counts)
    meta = stored(tier, 1)
    for _ in range(3):
        road.cut()
        if operation == "ask":
            assert is_there(tier, meta)
        elif operation == "read":
            assert read_back(tier, meta) == bytes_of(filled(meta))
        else:
            stored(tier, 2)
    assert road.num_connections == 8 and counts["tier_retries:remote"] == 3
    assert not tier.is_given_up and not any(name.startswith("tier_failures") for name in counts)


def test_a_store_that_stands_still_costs_one_time_out_and_comes_back(
    server: RedisServer, road: Road, counts: Counts
) -> None:
    tier = remote_tier(resp(road.port, timeout_s=SHORT_S), counts)
    meta = stored(tier, 1)
    road.is_open.clear()
    tier._presence.clear()
    for seed in range(100):
        tier.ask([meta_of(seed)])
        with pytest.raises(EntryLostError):
            tier.read(meta, blank(meta))
        with pytest.raises(OSError, match="store"):
            stored(tier, 2)
    assert tier.is_given_up and tier.is_known(meta.key) and tier.find(meta.key) is None
    assert [counts[f"tier_failures:remote_{kind}"] for kind in ("timeout", "connect", "error")] == [1, 0, 0]
    assert "does not answer" in tier.check()[0]
    tier._presence.held(meta)
    with pytest.raises(ControlError, match="not asked until"):
        tier.clear()
    tier.refresh()
    assert tier.is_given_up, "it still stands still"
    road.is_open.set()
    tier.refresh()
    assert not tier.is_given_up and tier.check() == []
    assert is_there(tier, meta) and read_back(tier, meta) == bytes_of(filled(meta))
    assert counts["tier_breaker:remote_opened"] == counts["tier_breaker:remote_closed"] == 1


def test_a_store_that_is_merely_slow_does_everything(server: RedisServer, road: Road, counts: Counts) -> None:
    tier = remote_tier(resp(road.port), counts)
    road.delay_s = 0.2  # of a time-out of many seconds
    meta = stored(tier, 1)
    assert is_there(tier, meta) and read_back(tier, meta) == bytes_of(filled(meta))
    assert not is_there(tier, meta_of(2))
    other = remote_tier(resp(road.port), counts)  # connects slowly as well
    assert is_there(other, meta) and read_back(other, meta) == bytes_of(filled(meta))
    assert other.clear() == 1 and server.blobs() == []
    assert road.num_delayed >= 8, "each operation waited"
    assert counts == {"asked_entries:remote_hit": 2, "asked_entries:remote_miss": 1}, "and none failed"


def test_a_store_slower_than_the_time_out_costs_one_and_its_late_answers_are_not_mistaken(
    server: RedisServer, road: Road, counts: Counts
) -> None:
    tier = remote_tier(resp(road.port, timeout_s=SHORT_S), counts)
    metas = [stored(tier, seed) for seed in range(3)]
    road.delay_s = 2 * SHORT_S
    for meta in metas:
        with pytest.raises(EntryLostError):
            read_back(tier, meta)
        with pytest.raises(OSError, match="store"):
            stored(tier, 4)
    assert tier.is_given_up and counts["tier_failures:remote_timeout"] == 1
    tier.refresh()
    assert tier.is_given_up, "it is as slow as before"
    road.delay_s = 0.0
    tier.refresh()
    assert not tier.is_given_up and tier.check() == []
    for meta in metas:
        assert is_there(tier, meta) and read_back(tier, meta) == bytes_of(filled(meta))
    assert counts["tier_breaker:remote_opened"] == counts["tier_breaker:remote_closed"] == 1
    assert counts["tier_failures:remote_timeout"] == 1 and counts["tier_retries:remote"] == 0


def test_a_store_that_is_not_there_at_the_start_is_found_later(tmp_path: Path, counts: Counts) -> None:
    port = free_port()
    tier = remote_tier(resp(port, timeout_s=SHORT_S), counts)
    for seed in range(10):
        assert not is_there(tier, meta_of(seed))
    assert tier.is_given_up and counts["tier_failures:remote_connect"] == 1
    with running(tmp_path) as server:
        road = Road(server.port)
        other = remote_tier(resp(road.port, timeout_s=SHORT_S))
        meta = stored(other, 1)
        tier._link._connect = other._link._connect  # as if it had come up on the old port
        tier.refresh()
        assert is_there(tier, meta)
        road.close()


def test_a_full_store_is_read_but_takes_nothing(server: RedisServer, counts: Counts) -> None:
    tier = remote_tier(resp(server.port), counts)
    meta = stored(tier, 1)
    server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    server.ask("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(OSError, match="not taken"):
        stored(tier, 2)
    assert counts["tier_retries:remote"] == 2, "bounded"
    assert not tier.is_given_up and tier.find(meta_of(2).key) is None
    assert is_there(tier, meta) and read_back(tier, meta) == bytes_of(filled(meta))
    server.ask("CONFIG", "SET", "maxmemory", "0")
    stored(tier, 2)
    assert is_there(tier, meta_of(2))


@pytest.mark.parametrize("where", ["start", "header", "middle", "end"])
def test_altered_bytes_are_lost_and_removed(server: RedisServer, counts: Counts, where: str) -> None:
    tier = remote_tier(resp(server.port), counts)
    meta = stored(tier, 1)
    name = blob_of(server, meta)
    value = bytearray(server.ask("GET", name))
    at = {"start": 0, "header": 60, "middle": len(value) // 2, "end": len(value) - 1}[where]
    value[at] ^= 1
    server.ask("SET", name, bytes(value))
    with pytest.raises(EntryLostError):
        read_back(tier, meta)
    assert tier.find(meta.key) is None and server.blobs() == []
    assert not tier.is_given_up and not is_there(tier, meta)
    stored(tier, 1)
    assert read_back(tier, meta) == bytes_of(filled(meta))


@pytest.mark.parametrize("value", [b"x", "cut", "longer"])
def test_values_of_another_length_are_lost_and_removed(server: RedisServer, counts: Counts, value: Any) -> None:
    """lmcache's connections are out of step afterwards, so it takes new ones."""
    tier = remote_tier(resp(server.port), counts)
    meta, other = stored(tier, 1), stored(tier, 2)
    name = blob_of(server, meta)
    whole = server.ask("GET", name)
    server.ask("SET", name, {"cut": whole[:-1], "longer": whole + b"x"}.get(value, value))
    with pytest.raises(EntryLostError):
        read_back(tier, meta)
    assert not tier.is_given_up and not is_there(tier, meta)
    for _ in range(4):  # more often than there are connections
        assert is_there(tier, other) and read_back(tier, other) == bytes_of(filled(other))


def test_an_empty_value_for_which_lmcache_waits_in_vain_costs_one_time_out(server: RedisServer, counts: Counts) -> None:
    tier = remote_tier(resp(server.port, timeout_s=SHORT_S), counts)
    meta = stored(tier, 1)
    server.ask("SET", blob_of(server, meta), b"")
    with pytest.raises(EntryLostError):
        read_back(tier, meta)
    assert tier.is_given_up
    tier.refresh()
    assert not tier.is_given_up and not is_there(tier, meta) and server.blobs() == []
    assert counts["tier_failures:remote_timeout"] == 1


def test_bytes_of_another_entry_are_lost(server: RedisServer) -> None:
    tier = remote_tier(resp(server.port))
    one, other = stored(tier, 1), stored(tier, 2)
    server.ask("SET", blob_of(server, one), server.ask("GET", blob_of(server, other)))
    with pytest.raises(EntryLostError, match="another key"):
        read_back(tier, one)


def test_an_entry_is_there_only_with_the_blobs_of_all_ranks(server: RedisServer) -> None:
    tier = remote_tier(resp(server.port), world_size=2)
    meta = stored(tier, 1, world_size=2)
    server.ask("DEL", blob_of(server, meta, rank=1))
    with pytest.raises(EntryLostError, match="gone"):
        read_back(tier, meta, 2)
    assert not is_there(tier, meta)


def test_the_tenant_is_in_the_name_of_the_blob(server: RedisServer) -> None:
    tier = remote_tier(resp(server.port))
    stored(tier, 1, entry_class=EntryClass("kv", "image", "0123456789abcdef"))
    stored(tier, 2, entry_class=EMBEDDING)
    assert [key.endswith(b"@0123456789abcdef") for key in server.blobs()].count(True) == 1


def test_many_threads_use_a_store_that_comes_and_goes(server: RedisServer, road: Road) -> None:
    """Whatever is read is right, and in the end all is as if nothing had been."""
    tier = remote_tier(resp(road.port, timeout_s=SHORT_S))
    metas = [stored(tier, seed) for seed in range(8)]
    is_over, num_right = threading.Event(), Counter[int]()

    def use(number: int) -> None:
        chosen = random.Random(number)
        while not is_over.is_set():
            meta = chosen.choice(metas)
            tier.ask([meta])
            with suppress(EntryLostError):
                assert read_back(tier, meta) == bytes_of(filled(meta))
                num_right[number] += 1
            with suppress(OSError):
                tier.write(meta, filled(meta))
            tier.refresh()

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use, number) for number in range(4)]
        for _ in range(4):
            road.cut()
            time.sleep(0.1)
            road.is_open.clear()
            time.sleep(0.1)
            road.cut()
            road.is_open.set()
            time.sleep(0.1)
        is_over.set()
        for user in users:
            user.result(60)
    assert min(num_right[number] for number in range(4)) > 0
    tier.refresh()
    for meta in metas:
        tier.write(meta, filled(meta))
        assert is_there(tier, meta) and read_back(tier, meta) == bytes_of(filled(meta))
