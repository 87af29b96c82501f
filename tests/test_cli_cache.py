"""`vlcache ls | check | clear` against processes with a real host index behind a real control socket."""

import json
import os
import pty
import signal
from pathlib import Path

import pytest

from command_line import Run, Start, process_of
from small_host import ENTRY_NBYTES, key_of

# -- which cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["ls"], ["check"], ["clear", "--yes"], ["snapshot", "image"]])
def test_without_a_cache_the_error_says_how_to_point_to_one(run: Run, runtime: Path, command: list[str]) -> None:
    status, out, err = run(*command)
    assert (status, out) == (2, "")
    assert err.startswith(f"vlcache {command[0]}: no running cache was found in {runtime}; ")
    assert "--socket PATH" in err and "--disk FOLDER" in err
    assert err.count("\n") == 1


def test_of_several_caches_one_must_be_chosen(run: Run, start: Start) -> None:
    first, second = start("model/a", 1), start("model/b", 2)
    status, out, err = run("ls")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"--pid {first.pid} (model/a, 1 entry, running for " in err
    assert f"--pid {second.pid} (model/b, 2 entries, running for " in err
    status, out, _ = run("ls", "--json", "--pid", second.pid)
    assert status == 0
    assert json.loads(out)["cache"]["model"] == "model/b"
    status, _, err = run("ls", "--pid", 1)
    assert status == 2
    assert "no running cache of process 1 was found" in err


def test_a_socket_can_be_named_and_one_that_is_dead_is_no_cache(run: Run, start: Start, runtime: Path) -> None:
    process = start()
    (path,) = runtime.glob("*.sock")
    assert run("check", "--socket", path)[0] == 0
    process.kill()
    process.wait()
    status, out, err = run("check", "--socket", path)
    assert (status, out) == (2, "")
    assert err == f"vlcache check: no cache answers at {path} (Connection refused)\n"


def test_a_process_that_was_killed_is_not_listed(run: Run, start: Start, runtime: Path) -> None:
    killed, _ = start("model/a"), start("model/b")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    status, out, _ = run("ls", "--json")
    assert status == 0
    assert json.loads(out)["cache"]["model"] == "model/b"
    assert len(list(runtime.iterdir())) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "--limit", "-1"],
        ["ls", "--sort", "name"],
        ["ls", "--pid", "1", "--disk", "d"],
        ["snapshot"],
        ["snapshot", "image", "--cancel"],
        ["snapshot", "image", "--bandwidth", "fast"],
        ["snapshot", "image", "--disk", "d"],
        ["clear", "--pid", "me"],
    ],
)
def test_a_wrong_command_line_is_status_2(run: Run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: vlcache ")


def test_help_names_the_commands_and_the_statuses(run: Run) -> None:
    _, out, _ = run("--help")
    for word in ("env ", "explain ", "warm ", "ls ", "check ", "clear ", "snapshot ", "\n  130  interrupted"):
        assert word in out


# -- ls ---------------------------------------------------------------------------------------------------------------


def test_ls_is_a_table_with_aligned_columns_and_sums(run: Run, start: Start) -> None:
    start(num_entries=1200)
    status, out, err = run("ls", "--limit", 2, "--sort", "tokens")
    assert (status, err) == (0, "")
    titles, first, second, *rest = out.splitlines()
    assert titles.split() == ["TIER", "KEY", "KIND", "MODALITY", "TENANT", "TOKENS", "SIZE", "USES", "USED", "AGE"]
    assert first.split()[:6] == ["host", key_of(1199).hex()[:16], "embedding", "image", "-", "1,200"]
    assert second.split()[:6] == ["host", key_of(1198).hex()[:16], "kv", "image", "00112233aabbccdd", "1,199"]
    assert first.split()[6:10] == ["1.0", "MiB", "0", "0"]
    for column in ("KEY", "KIND", "MODALITY"):
        assert first[titles.index(column) - 1] == " " != first[titles.index(column)]
    for column, value in (("TOKENS", "1,200"), ("SIZE", "1.0 MiB"), ("USES", "0"), ("USED", "0 s")):
        assert first[: titles.index(column) + len(column)].endswith(f" {value}")
    assert rest == [
        "",
        "host: 1,200 entries, 1.2 GiB of 1.2 GiB: 600 kv (600 MiB), 600 embedding (600 MiB)",
        "2 of 1,200 are listed; --limit 0 lists all",
    ]


def test_ls_of_an_empty_cache_says_so(run: Run, start: Start) -> None:
    start(num_entries=0)
    assert run("ls") == (0, "host: 0 entries, 0 B of 1.0 MiB\n", "")


def test_ls_for_programs_is_one_document(run: Run, start: Start) -> None:
    start(num_entries=3)
    status, out, _ = run("ls", "--json", "--limit", 0, "--sort", "tokens")
    found = json.loads(out)
    assert status == 0
    assert [entry["key"] for entry in found["entries"]] == [key_of(number).hex() for number in (2, 1, 0)]
    assert found["cache"]["tiers"][0]["used_nbytes"] == 3 * ENTRY_NBYTES
    assert sum(total["entries"] for total in found["totals"]) == 3


def test_a_reader_that_has_seen_enough_is_no_error(start: Start, runtime: Path) -> None:
    start(num_entries=5000)
    vlcache = process_of(runtime, "ls", "--limit", "0")
    assert vlcache.stdout is not None and vlcache.stderr is not None
    assert vlcache.stdout.readline().startswith("TIER")
    vlcache.stdout.close()
    assert vlcache.stderr.read() == ""
    assert vlcache.wait() == 141


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_of_a_cache_that_changes_all_the_time_finds_nothing_wrong(run: Run, start: Start) -> None:
    start("vision/model", 50, "busy")
    assert run("check") == (0, "all well: 50 entries, 50 MiB\n", "")
    assert run("check", "--deep") == (0, "all well: 50 entries, 50 MiB\n", "")


def test_check_of_a_damaged_cache_names_each_problem_and_fails(run: Run, start: Start) -> None:
    start("vision/model", 5, "damaged")
    status, out, _ = run("check")
    assert status == 1
    assert sorted(key for key in (key_of(0), key_of(1)) if key.hex()[:16] in out.splitlines()[0]) == sorted(
        (key_of(0), key_of(1))
    )
    assert out.splitlines()[1:] == ["1 problem in 5 entries"]
    status, out, _ = run("check", "--json")
    assert status == 1
    assert [("share bytes" in problem) for problem in json.loads(out)["problems"]] == [True]


# -- clear ------------------------------------------------------------------------------------------------------------


def test_clear_without_a_terminal_wants_to_be_sure(start: Start, runtime: Path, run: Run) -> None:
    start(num_entries=3)
    vlcache = process_of(runtime, "clear")
    out, err = vlcache.communicate()
    assert (vlcache.returncode, out) == (1, "")
    assert err == "vlcache clear: there is no terminal to ask at; give --yes to remove without being asked\n"
    assert run("check")[1].startswith("all well: 3 entries")


def test_clear_removes_what_it_was_told_to(start: Start, run: Run) -> None:
    start(num_entries=3)
    status, out, err = run("clear", "--tier", "disc", "--yes")
    assert (status, out) == (1, "")
    assert err == "vlcache clear: there is no tier 'disc' in this cache; there are host\n"
    assert run("clear", "--tier", "host", "--yes") == (0, "removed 3 entries of host\n", "")
    assert run("check")[1] == "all well: 0 entries, 0 B\n"
    status, out, _ = run("clear", "--yes", "--json")
    assert json.loads(out) == {"removed": {"host": 0}}


@pytest.mark.parametrize(("typed", "status", "left"), [("y\n", 0, 0), ("Yes\n", 0, 0), ("n\n", 1, 3), ("\n", 1, 3)])
def test_clear_asks_at_a_terminal(start: Start, runtime: Path, run: Run, typed: str, status: int, left: int) -> None:
    start(num_entries=3)
    keyboard, terminal = pty.openpty()
    vlcache = process_of(runtime, "clear", stdin=terminal)
    os.write(keyboard, typed.encode())
    out, err = vlcache.communicate()
    os.close(keyboard)
    os.close(terminal)
    assert vlcache.returncode == status
    assert err.startswith("This removes host: 3 entries, 3.0 MiB. Go on? [y/N] ")
    assert ("removed 3 entries of host" in out) == (status == 0)
    assert ("nothing was removed" in err) == (status == 1)
    assert run("check")[1].startswith(f"all well: {left} entries")
