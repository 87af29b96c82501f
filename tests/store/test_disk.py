"""The disk tier on a healthy folder: what was written is read, found after a restart, bounded, and shared."""

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from store.entries import EMBEDDING, KV, blank, bytes_of, filled, key_of, meta_of, read_back, stored
from vlcache_connector.store.base import EntryLostError, EntryMeta, Part, Tier
from vlcache_connector.store.digests import PIECE_NBYTES
from vlcache_connector.store.disk.folder import TemporaryFile
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.types import EntryClass

PLENTY = 10**9
MakeTier = Callable[..., DiskTier]


@pytest.fixture
def make_tier(tmp_path: Path) -> MakeTier:
    def make(capacity_nbytes: int = PLENTY, world_size: int = 1) -> DiskTier:
        return DiskTier(tmp_path / "cache", capacity_nbytes, world_size)

    return make


def files_of(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").rglob("*") if not path.is_dir())


def used_at(tmp_path: Path, meta: EntryMeta, seconds: int) -> None:
    """Pretend that an entry was used then."""
    for path in files_of(tmp_path):
        if path.name.startswith(meta.key.hex()):
            os.utime(path, (seconds, seconds))


def test_it_is_a_tier(make_tier: MakeTier) -> None:
    tier: Tier = make_tier()
    assert tier.name == "disk"


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_what_was_written_is_read(make_tier: MakeTier, world_size: int) -> None:
    tier = make_tier(world_size=world_size)
    metas = [stored(tier, seed, num_tokens=seed + 1, world_size=world_size) for seed in range(5)]
    for meta in metas:
        assert tier.find(meta.key) == meta.num_tokens
        assert read_back(tier, meta, world_size) == bytes_of(filled(meta, world_size))
    assert tier.check(deep=True) == []


@pytest.mark.parametrize("nbytes", [1, PIECE_NBYTES - 1, PIECE_NBYTES, PIECE_NBYTES + 1, 3 * PIECE_NBYTES + 17])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_parts_of_any_length_by_any_number_of_threads(tmp_path: Path, nbytes: int, num_threads: int) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=1, num_threads=num_threads)
    meta = EntryMeta(key_of(1), 1, EMBEDDING)
    parts = [Part(f"part.{i}", "U8", (nbytes,), memoryview(bytearray(os.urandom(nbytes)))) for i in range(3)]
    tier.write(meta, [parts])
    into = [Part(part.name, "U8", (nbytes,), memoryview(bytearray(nbytes))) for part in parts]
    tier.read(meta, [into])
    assert bytes_of([into]) == bytes_of([parts])
    assert tier.check(deep=True) == []
    tier.close()


def test_what_was_not_written_is_not_there(make_tier: MakeTier) -> None:
    tier = make_tier()
    assert tier.find(key_of(1)) is None
    assert list(tier.entries()) == []
    with pytest.raises(EntryLostError):
        tier.read(meta_of(1), blank(meta_of(1)))


def test_an_embedding_has_one_file_whatever_the_number_of_ranks(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier(world_size=2)
    meta = stored(tier, 1, entry_class=EMBEDDING)
    assert len(files_of(tmp_path)) == 1
    assert tier.find(meta.key) == 4
    assert read_back(tier, meta) == bytes_of(filled(meta))
    assert make_tier(world_size=8).find(meta.key) == 4


def test_entries_are_found_after_a_restart(make_tier: MakeTier) -> None:
    tier = make_tier(world_size=2)
    kv = stored(tier, 1, world_size=2)
    embedding = stored(tier, 2, entry_class=EntryClass("embedding", "video", "0123456789abcdef"))
    nbytes = tier.nbytes
    tier.close()
    tier = make_tier(world_size=2)
    assert {meta.key: (meta.num_tokens, meta.entry_class) for meta in tier.entries()} == {
        kv.key: (4, KV),
        embedding.key: (4, embedding.entry_class),
    }
    assert tier.nbytes == nbytes
    assert read_back(tier, kv, 2) == bytes_of(filled(kv, 2))
    assert read_back(tier, embedding) == bytes_of(filled(embedding))
    assert tier.check(deep=True) == []


def test_nobody_else_may_look_into_the_folder(make_tier: MakeTier, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        stored(make_tier(), 1)
    finally:
        os.umask(before)
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_bytes_of_files_are_what_is_counted(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier(world_size=2)
    for seed in range(4):
        stored(tier, seed, world_size=2)
    stored(tier, 3, world_size=2)  # once more
    assert tier.nbytes == sum(path.stat().st_size for path in files_of(tmp_path))
    assert (len(tier), len(files_of(tmp_path))) == (4, 8)
    assert tier.check() == []


def test_an_entry_written_with_other_facts_replaces_the_one_before(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier(world_size=2)
    stored(tier, 1, num_tokens=4, world_size=2)
    stored(tier, 1, num_tokens=5, entry_class=EMBEDDING)
    assert tier.find(key_of(1)) == 5
    assert len(files_of(tmp_path)) == 1
    assert tier.check(deep=True) == []


def size_of_one(make_tier: MakeTier) -> int:
    tier = make_tier()
    stored(tier, 0)
    nbytes = tier.nbytes
    tier.clear()
    return nbytes


def test_the_entry_used_longest_ago_makes_room(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier(3 * size_of_one(make_tier))
    metas = [stored(tier, seed) for seed in range(3)]
    read_back(tier, metas[0])
    metas.append(stored(tier, 3))
    assert [tier.find(meta.key) for meta in metas] == [4, None, 4, 4]
    assert (tier.evictions, len(files_of(tmp_path))) == (1, 3)
    assert tier.check() == []


def test_the_order_of_use_survives_a_restart(make_tier: MakeTier, tmp_path: Path) -> None:
    size = size_of_one(make_tier)
    tier = make_tier(3 * size)
    metas = [stored(tier, seed) for seed in range(3)]
    for meta, seconds in zip(metas, (1000, 2000, 3000), strict=True):
        used_at(tmp_path, meta, seconds)
    read_back(tier, metas[0])
    tier = make_tier(3 * size)
    metas += [stored(tier, 3), stored(tier, 4)]
    assert [tier.find(meta.key) for meta in metas] == [4, None, None, 4, 4]


def test_files_beyond_the_bound_leave_at_start_up(make_tier: MakeTier, tmp_path: Path) -> None:
    size = size_of_one(make_tier)
    tier = make_tier()
    metas = [stored(tier, seed) for seed in range(5)]
    for meta, seconds in zip(metas, (5000, 1000, 4000, 2000, 3000), strict=True):
        used_at(tmp_path, meta, seconds)
    tier = make_tier(2 * size + size // 2)
    assert [tier.find(meta.key) for meta in metas] == [4, None, 4, None, None]
    assert len(files_of(tmp_path)) == 2


def test_entries_of_another_number_of_ranks_count_and_leave_but_are_not_found(make_tier: MakeTier) -> None:
    size = size_of_one(make_tier)
    other = stored(make_tier(world_size=2), 1, world_size=2)
    tier = make_tier(3 * size)
    assert tier.find(other.key) is None
    assert list(tier.entries()) == []
    assert len(tier) == 1
    assert tier.nbytes > size
    for seed in range(2, 5):
        stored(tier, seed)
    assert (len(tier), tier.evictions) == (3, 1)
    assert make_tier(world_size=2).find(other.key) is None


def test_what_cannot_fit_is_refused_and_evicts_nothing(make_tier: MakeTier, tmp_path: Path) -> None:
    size = size_of_one(make_tier)
    tier = make_tier(size)
    meta = stored(tier, 1)
    with pytest.raises(OSError, match="no room"):
        stored(tier, 2, num_tokens=400)
    assert tier.find(meta.key) == 4
    assert (tier.evictions, len(files_of(tmp_path))) == (0, 1)


def test_a_mistake_of_the_caller_leaves_nothing_behind(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier()
    for entry_class in (
        EntryClass("kv", "../../etc"),
        EntryClass("kv", "image", "../../etc"),
        EntryClass("kv", "image", "ABCDEF0123456789"),
        EntryClass("other", "image"),
        EntryClass("kv", ""),
        EntryClass("kv", "image", "0"),
    ):
        with pytest.raises(ValueError, match="called"):
            stored(tier, 1, entry_class=entry_class)
    with pytest.raises(ValueError, match="called"):
        tier.write(EntryMeta(b"short", 4, KV), filled(meta_of(1)))
    assert files_of(tmp_path) == []
    assert tier.nbytes == 0
    assert tier.check() == []


def test_clear_removes_everything(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier(world_size=2)
    metas = [stored(tier, seed, world_size=2) for seed in range(3)]
    assert tier.clear() == 3
    assert [tier.find(meta.key) for meta in metas] == [None] * 3
    assert (len(tier), tier.nbytes, files_of(tmp_path), tier.check()) == (0, 0, [], [])
    stored(tier, 1, world_size=2)
    assert tier.check(deep=True) == []


def test_what_another_engine_wrote_is_found_after_a_refresh(make_tier: MakeTier) -> None:
    one, other = make_tier(), make_tier()
    metas = [stored(one, seed) for seed in range(20)]
    assert other.find(metas[0].key) is None
    other.refresh()
    assert [other.find(meta.key) for meta in metas] == [4] * 20
    assert other.nbytes == one.nbytes
    metas.append(stored(one, 20))  # in the same clock tick as the listing, perhaps
    other.refresh()
    assert read_back(other, metas[20]) == bytes_of(filled(metas[20]))
    assert other.check() == []


def test_what_another_engine_deleted_is_a_miss(make_tier: MakeTier, caplog: pytest.LogCaptureFixture) -> None:
    one, other = make_tier(), make_tier()
    metas = [stored(one, seed) for seed in range(20)]
    other.refresh()
    one.clear()
    with pytest.raises(EntryLostError):
        read_back(other, metas[0])
    assert other.find(metas[0].key) is None
    assert other.find(metas[1].key) == 4
    other.refresh()
    assert other.find(metas[1].key) is None
    assert (other.nbytes, other.check()) == (0, [])
    assert caplog.records == []  # nothing is wrong


def test_refresh_lists_only_folders_that_changed(make_tier: MakeTier, tmp_path: Path) -> None:
    """Seen by a file that was put there behind the back of the folder's time of modification."""
    tier = make_tier()
    meta = stored(tier, 1)
    (path,) = files_of(tmp_path)
    os.utime(path.parent, (1000, 1000))
    tier.refresh()
    path.unlink()
    os.utime(path.parent, (1000, 1000))
    tier.refresh()
    assert tier.find(meta.key) == 4
    os.utime(path.parent, (1001, 1001))
    tier.refresh()
    assert tier.find(meta.key) is None


def test_a_change_within_one_tick_of_the_file_system_s_clock_is_seen(make_tier: MakeTier, tmp_path: Path) -> None:
    """A folder that has changed just before it was listed may have changed again at the same time."""
    tier = make_tier()
    meta = stored(tier, 1)
    (path,) = files_of(tmp_path)
    now = time.time()
    os.utime(path.parent, (now, now))
    tier.refresh()
    path.unlink()
    os.utime(path.parent, (now, now))
    tier.refresh()
    assert tier.find(meta.key) is None


def test_an_entry_is_there_only_with_the_files_of_all_ranks(make_tier: MakeTier, tmp_path: Path) -> None:
    meta = stored(make_tier(world_size=3), 1, world_size=3)
    files_of(tmp_path)[1].unlink()
    tier = make_tier(world_size=3)
    assert tier.find(meta.key) is None
    assert files_of(tmp_path) == []  # nobody will complete it
    assert (len(tier), tier.nbytes, tier.check()) == (0, 0, [])


def test_an_entry_half_in_place_is_left_to_its_writer(make_tier: MakeTier, tmp_path: Path) -> None:
    meta = stored(make_tier(world_size=2), 1, world_size=2)
    first, second = files_of(tmp_path)
    hidden = tmp_path / "hidden"
    second.rename(hidden)
    with first.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        tier = make_tier(world_size=2)
        assert tier.find(meta.key) is None
        assert files_of(tmp_path) == [first]
        assert len(tier.check()) == 1
        hidden.rename(second)
    tier.refresh()
    assert read_back(tier, meta, 2) == bytes_of(filled(meta, 2))
    assert tier.check() == []


def test_half_an_entry_goes_once_its_writer_has_died(make_tier: MakeTier, tmp_path: Path) -> None:
    stored(make_tier(world_size=2), 1, world_size=2)
    first, second = files_of(tmp_path)
    second.unlink()
    os.utime(first.parent, (1000, 1000))  # nothing in the folder will change any more
    with first.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        tier = make_tier(world_size=2)
        tier.refresh()
        assert files_of(tmp_path) == [first]
    tier.refresh()
    assert files_of(tmp_path) == []
    assert (tier.nbytes, tier.check()) == (0, [])


def test_temporary_files_of_the_living_stay_and_those_of_the_dead_go(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier()
    (tmp_path / "cache" / "tmp" / secrets.token_hex(16)).write_bytes(b"half an entry")
    stranger = tmp_path / "cache" / "tmp" / "notes.txt"  # somebody may have named a folder like /var
    stranger.write_bytes(b"not ours")
    assert len(tier.check()) == 1
    with closing(TemporaryFile(tmp_path / "cache")) as living:
        tier.refresh()
        assert set(files_of(tmp_path)) == {living.path, stranger}
        assert tier.check() == []
    assert files_of(tmp_path) == [stranger]


def test_strays_are_left_alone_and_reported(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier()
    meta = stored(tier, 1)
    (path,) = files_of(tmp_path)
    strays = [
        path.parent / "notes.txt",
        path.parent / path.name.replace("image", "im-age"),
        path.parent / path.name.replace("kv4", "kv04"),
        path.parent / path.name.replace("0of1", "1of1"),
        path.parent / path.name.replace(meta.key.hex(), meta.key.hex().upper()),
        path.parent / path.name.replace(meta.key.hex(), ("0" if path.name[0] != "0" else "1") * 64),
    ]
    for stray in strays:
        stray.write_bytes(b"x")
    tier = make_tier()
    assert len(tier) == 1
    problems = tier.check()
    assert len(problems) == len(strays)
    assert all(any(stray.name in problem for problem in problems) for stray in strays)
    tier.clear()
    assert files_of(tmp_path) == sorted(strays)


def test_check_finds_every_disagreement(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier(world_size=2)
    gone, short, half, altered = (stored(tier, seed, world_size=2) for seed in range(4))
    new = stored(make_tier(world_size=2), 9, world_size=2)

    def files(meta: EntryMeta) -> list[Path]:
        return [path for path in files_of(tmp_path) if path.name.startswith(meta.key.hex())]

    for path in files(gone):
        path.unlink()
    os.truncate(files(short)[0], 10)
    files(half)[1].unlink()
    content = bytearray(files(altered)[0].read_bytes())
    content[-1] ^= 1
    files(altered)[0].write_bytes(content)
    problems = tier.check(deep=True)
    for meta in (gone, short, half, altered, new):
        assert any(meta.key.hex() in problem for problem in problems), problems
    assert not any(altered.key.hex() in problem for problem in tier.check())
