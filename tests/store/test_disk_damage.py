"""Whatever is in the place of a file: a miss, one line in the log, nothing to try again, and never a wrong byte."""

import json
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from store.entries import EMBEDDING, Ranks, blank, bytes_of, filled, meta_of, read_back, shapes_of, stored
from vlcache_connector.store.base import EntryLostError, EntryMeta, Part
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.types import EntryClass

PLENTY = 10**9


def path_of(root: Path, meta: EntryMeta, rank: int = 0) -> Path:
    (path,) = root.glob(f"??/{meta.key.hex()}.*.{rank}of*")
    return path


def assert_lost(tier: DiskTier, meta: EntryMeta, into: Ranks | None = None) -> None:
    """A miss, and from now on not even found."""
    with pytest.raises(EntryLostError) as caught:
        tier.read(meta, into or blank(meta))
    assert meta.key.hex() in str(caught.value)
    assert tier.find(meta.key) is None
    tier.refresh()
    assert tier.find(meta.key) is None


def test_every_flipped_byte_of_a_file_is_a_miss(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=1)
    meta = stored(tier, 1, num_tokens=1)
    good = path_of(tmp_path, meta).read_bytes()
    assert 500 < len(good) < 2000
    for i in range(len(good)):
        tier.write(meta, filled(meta))
        altered = bytearray(good)
        altered[i] ^= 1 << i % 8
        path_of(tmp_path, meta).write_bytes(altered)
        with pytest.raises(EntryLostError):
            tier.read(meta, blank(meta))
        assert tier.find(meta.key) is None
    assert list(tmp_path.glob("??/*")) == []
    assert tier.check() == []


def test_a_flipped_byte_in_a_large_part_is_a_miss_wherever_it_is(tmp_path: Path) -> None:
    """Several pieces per part, several threads."""
    tier = DiskTier(tmp_path, PLENTY, world_size=1, num_threads=3)
    meta = meta_of(1, 1, EMBEDDING)
    nbytes = 2_000_001
    part = Part("embedding", "U8", (nbytes,), memoryview(bytearray(os.urandom(nbytes))))
    tier.write(meta, [[part]])
    good = path_of(tmp_path, meta).read_bytes()
    for at in (1, 524_287, 524_288, 1_048_576, nbytes):
        tier.write(meta, [[part]])
        altered = bytearray(good)
        altered[-at] ^= 0x10
        path_of(tmp_path, meta).write_bytes(altered)
        assert_lost(tier, meta, [[replace(part, buffer=memoryview(bytearray(nbytes)))]])


def test_every_length_but_the_right_one_is_a_miss(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=1)
    meta = stored(tier, 1, num_tokens=1)
    good = path_of(tmp_path, meta).read_bytes()
    for length in [*range(0, len(good), 7), len(good) - 1, len(good) + 1, 2 * len(good)]:
        tier.write(meta, filled(meta))
        path_of(tmp_path, meta).write_bytes(good.ljust(length, b"\0")[:length])
        with pytest.raises(EntryLostError):
            tier.read(meta, blank(meta))


def test_damage_to_one_rank_loses_the_whole_entry(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=3)
    meta = stored(tier, 1, world_size=3)
    path = path_of(tmp_path, meta, rank=2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_lost(tier, meta, blank(meta, 3))
    assert list(tmp_path.glob("??/*")) == []
    assert (tier.nbytes, tier.check()) == (0, [])


def test_ranks_in_each_other_s_place_are_a_miss(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=2)
    meta = stored(tier, 1, world_size=2)
    first, second = path_of(tmp_path, meta, 0), path_of(tmp_path, meta, 1)
    spare = tmp_path / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    assert_lost(tier, meta, blank(meta, 2))


def foreign_safetensors(content: bytes) -> bytes:
    """A good safetensors file with the same tensors, which nobody here has written."""
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    table["__metadata__"] = {"format": "pt"}
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "zeros": lambda content: bytes(len(content)),
    "noise": lambda content: os.urandom(len(content)),
    "no data": lambda content: content[: 8 + int.from_bytes(content[:8], "little")],
    "huge header": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "header as long as the file": lambda content: struct.pack("<Q", len(content) - 8) + content[8:],
    "header longer than the file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "long header": lambda _: struct.pack("<Q", 2**24) + b" " * 2**24,
    "foreign safetensors": foreign_safetensors,
    "another file format": lambda content: b"\x80\x04\x95" + content[3:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_with_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=1)
    meta, other = stored(tier, 1), stored(tier, 2)
    path = path_of(tmp_path, meta)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert_lost(tier, meta)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert path.name in caplog.text
    assert not path.exists()
    assert read_back(tier, other) == bytes_of(filled(other))
    assert tier.check(deep=True) == []
    tier.write(meta, filled(meta))
    assert read_back(tier, meta) == bytes_of(filled(meta))


def test_a_file_under_the_name_of_another_key_is_a_miss(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=1)
    meta, other = stored(tier, 1), stored(tier, 2)
    path_of(tmp_path, meta).write_bytes(path_of(tmp_path, other).read_bytes())
    into = blank(meta)
    assert_lost(tier, meta, into)
    assert bytes_of(into) == bytes_of(blank(meta)), "not one byte of another entry"


@pytest.mark.parametrize(
    "wanted",
    [
        replace(meta_of(1), num_tokens=5),
        replace(meta_of(1), entry_class=EMBEDDING),
        replace(meta_of(1), entry_class=EntryClass("kv", "video")),
        replace(meta_of(1), entry_class=EntryClass("kv", "image", "00" * 8)),
    ],
    ids=["tokens", "kind", "modality", "tenant"],
)
def test_another_kind_of_entry_under_the_key_is_a_miss(tmp_path: Path, wanted: EntryMeta) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=1)
    stored(tier, 1)
    assert_lost(tier, wanted)
    assert list(tmp_path.glob("??/*")) == []


@pytest.mark.parametrize("change", ["dtype", "shape", "name", "fewer", "more"])
def test_parts_of_another_model_are_a_miss(tmp_path: Path, change: str) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=1)
    meta = stored(tier, 1)
    (parts,) = blank(meta)
    match change:
        case "dtype":
            parts[0] = replace(parts[0], dtype="F16")
        case "shape":
            parts[0] = replace(parts[0], shape=(2, 4, 4, 2))
        case "name":
            parts[0] = replace(parts[0], name="layer.7")
        case "fewer":
            del parts[1]
        case "more":
            parts.append(replace(parts[1], name="layer.9"))
    assert_lost(tier, meta, [parts])


def test_other_numbers_of_ranks_than_stored_are_a_miss(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, PLENTY, world_size=2)
    meta = stored(tier, 1, world_size=2)
    assert_lost(tier, meta, blank(meta, 1))


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_bytes(b"somebody's")


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the whole path is too long for a socket's address
    try:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind("s")
        Path("s").rename(path.name)
    finally:
        os.chdir(here)


IN_ITS_PLACE: dict[str, Callable[[Path, Path], object]] = {
    "a link to its content": lambda path, spare: path.symlink_to(spare),
    "a link to nothing": lambda path, _: path.symlink_to("nowhere"),
    "a link to itself": lambda path, _: path.symlink_to(path.name),
    "a link to a device": lambda path, _: path.symlink_to("/dev/zero"),
    "a folder": lambda path, _: a_folder(path),
    "a pipe": lambda path, _: os.mkfifo(path),
    "a socket": lambda path, _: a_socket(path),
}


@pytest.mark.parametrize("thing", IN_ITS_PLACE)
@pytest.mark.parametrize("when", ["while serving", "before the start"])
def test_what_is_no_file_is_a_miss_and_never_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, thing: str, when: str
) -> None:
    root, spare = tmp_path / "cache", tmp_path / "spare"
    tier = DiskTier(root, PLENTY, world_size=1)
    meta = stored(tier, 1)
    path = path_of(root, meta)
    path.rename(spare)
    content = spare.read_bytes()
    IN_ITS_PLACE[thing](path, spare)
    if when == "before the start":
        tier = DiskTier(root, PLENTY, world_size=1)
        assert tier.find(meta.key) is None
    assert_lost(tier, meta)
    assert len(caplog.records) == (when == "while serving")
    assert spare.read_bytes() == content
    if thing == "a folder":
        assert (path / "inside").read_bytes() == b"somebody's"
        with pytest.raises(OSError, match="directory"):
            tier.write(meta, filled(meta))
        assert tier.find(meta.key) is None
        assert len(tier.check()) == 1  # the folder
        assert list((root / "tmp").iterdir()) == []
    else:
        tier.write(meta, filled(meta))
        assert read_back(tier, meta) == bytes_of(filled(meta))
        assert tier.check(deep=True) == []


def test_a_linked_folder_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    meta = stored(DiskTier(root, PLENTY, world_size=1), 1)
    folder = path_of(root, meta).parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    tier = DiskTier(root, PLENTY, world_size=1)
    assert tier.find(meta.key) is None
    tier.clear()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_small_file_that_claims_much_takes_no_memory(tmp_path: Path) -> None:
    """A sparse file of 1 TiB under a good name."""
    tier = DiskTier(tmp_path, 2**50, world_size=1)
    meta = stored(tier, 1)
    path = path_of(tmp_path, meta)
    path.write_bytes(struct.pack("<Q", 2**40 - 8))
    os.truncate(path, 2**40)
    assert_lost(tier, meta)


def test_shapes_cover_what_models_store() -> None:
    """What the tests above rely on: parts of several types and sizes."""
    assert {dtype for _, dtype, _ in shapes_of(meta_of(1))} == {"BF16", "I32"}
