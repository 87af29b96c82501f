"""`vlcache ls | check | clear --disk FOLDER`: a cache that no engine runs on."""

import errno
import json
import os
from pathlib import Path

import pytest

from command_line import Run
from store.entries import EMBEDDING, files_of, key_of, stored
from vlcache_connector.store.disk.catalog import DiskCatalog
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.types import EntryClass


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Embeddings of 10 and 11 tokens, and a KV entry of two ranks and 12 tokens; the first was used last."""
    tier = DiskTier(tmp_path / "cache", 1 << 30, world_size=2)
    stored(tier, 0, 10, EMBEDDING)
    stored(tier, 1, 11, EMBEDDING)
    stored(tier, 2, 12, EntryClass("kv", "image", "00112233aabbccdd"), world_size=2)
    tier.close()
    for path in files_of(tmp_path / "cache"):
        age_s = {key_of(0).hex(): 0, key_of(1).hex(): 7200, key_of(2).hex(): 90000}[path.name[:64]]
        os.utime(path, times=(path.stat().st_mtime - age_s,) * 2)
    return tmp_path / "cache"


def state_of(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in root.rglob("*")}


def test_ls_shows_what_is_on_disk_last_used_first(run: Run, root: Path) -> None:
    status, out, err = run("ls", "--disk", root)
    assert (status, err) == (0, "")
    _, *rows, _, sums = out.splitlines()
    assert [row.split()[:6] for row in rows] == [
        ["disk", key_of(0).hex()[:16], "embedding", "image", "-", "10"],
        ["disk", key_of(1).hex()[:16], "embedding", "image", "-", "11"],
        ["disk", key_of(2).hex()[:16], "kv", "image", "00112233aabbccdd", "12"],
    ]
    assert [row.split()[9:11] for row in rows[1:]] == [["2", "h"], ["1", "d"]]
    assert sums.startswith("disk: 3 entries, ")
    assert "1 kv (" in sums and "2 embedding (" in sums


def test_sizes_are_those_of_the_files_of_all_ranks(run: Run, root: Path) -> None:
    found = json.loads(run("ls", "--json", "--disk", root)[1])
    sizes = {entry["key"]: entry["nbytes"] for entry in found["entries"]}
    assert len(files_of(root)) == 4
    for key, nbytes in sizes.items():
        assert nbytes == sum(path.stat().st_size for path in files_of(root) if path.name.startswith(key))
    assert found["cache"]["tiers"][0]["used_nbytes"] == sum(sizes.values())
    assert found["cache"]["folder"] == str(root)


def test_looking_changes_nothing(run: Run, root: Path) -> None:
    (root / "tmp" / ("0" * 32)).write_text("by a writer that died")
    (root / "ab").mkdir(exist_ok=True)
    (root / "ab" / "stray").write_text("")
    before = state_of(root)
    assert run("ls", "--disk", root)[0] == 0
    status, out, _ = run("check", "--disk", root, "--deep")
    assert status == 1
    assert [line.split()[-1] for line in out.splitlines()] == ["died", "cache", "entries"]
    assert state_of(root) == before


def test_a_sound_folder_is_all_well(run: Run, root: Path) -> None:
    for deep in ([], ["--deep"]):
        status, out, _ = run("check", "--disk", root, *deep)
        assert status == 0
        assert out.startswith("all well: 3 entries, ")


@pytest.mark.parametrize("which", range(4))
def test_a_flipped_byte_is_found_by_a_deep_check_alone(run: Run, root: Path, which: int) -> None:
    path = files_of(root)[which]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert run("check", "--disk", root)[0] == 0
    status, out, _ = run("check", "--disk", root, "--deep")
    assert status == 1
    assert out.startswith(f"disk: {path}: ")
    assert out.endswith("1 problem in 3 entries\n")


def test_an_entry_without_the_file_of_one_rank_is_a_problem(run: Run, root: Path) -> None:
    next(root.glob("*/*.1of2.*")).unlink()
    status, out, _ = run("check", "--disk", root)
    assert status == 1
    assert f"entry {key_of(2).hex()} lacks the files of 1 ranks" in out


def test_clear_removes_the_files_and_tells_how_many_entries_those_were(run: Run, root: Path) -> None:
    assert run("clear", "--disk", root, "--yes") == (0, "removed 3 entries of disk\n", "")
    assert files_of(root) == []
    assert run("ls", "--disk", root) == (0, "disk: 0 entries, 0 B\n", "")


def test_clear_says_when_files_could_not_be_removed(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(DiskCatalog, "_unlink", unlink)
    status, out, err = run("clear", "--disk", root, "--yes")
    assert (status, out) == (1, "")
    assert err == f"vlcache clear: 3 of 3 entries could not be removed; see who may write {root}\n"


@pytest.mark.parametrize("command", [["ls"], ["check"], ["clear", "--yes"]])
def test_a_folder_that_is_no_cache_is_refused_and_left_alone(run: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "system" / "tmp").mkdir(parents=True)
    (tmp_path / "system" / "etc").mkdir()
    (tmp_path / "project" / "tmp").mkdir(parents=True)
    (tmp_path / "project" / "tmp" / "draft").write_text("mine")
    (tmp_path / "letter").write_text("mine")
    before = state_of(tmp_path)
    for name in ("photos", "system", "project", "letter", "missing"):
        status, out, err = run(*command, "--disk", tmp_path / name)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "is not the folder of a cache; give the one that the engine's disk_path names" in err
    assert state_of(tmp_path) == before


def test_a_cache_without_entries_is_one(run: Run, tmp_path: Path) -> None:
    DiskTier(tmp_path / "cache", 1 << 30, world_size=1).close()
    (tmp_path / "cache" / "lost+found").mkdir()
    assert run("ls", "--disk", tmp_path / "cache") == (0, "disk: 0 entries, 0 B\n", "")
