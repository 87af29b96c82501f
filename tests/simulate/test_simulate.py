"""`vlcache simulate` as users run it."""

import json
import sys
from pathlib import Path

import pytest

from vlcache_connector import cli
from vlcache_connector.simulate.report import capacities_of, size
from vlcache_connector.store.trace import Trace
from vlcache_connector.types import EntryClass


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Twelve pictures in a loop, each with a large entry and a small one that is worth more."""
    path = str(tmp_path / "trace")
    recorder = Trace(path, 8 << 20)
    for number in range(240):
        key = b"%d" % (number % 12)
        recorder.looked_up(b"kv" + key, 1 << 20, 0.1, EntryClass("kv", "image"), number >= 12)
        recorder.looked_up(b"e" + key, 1 << 17, 0.3, EntryClass("embedding", "image"), number >= 12)
    recorder.close()
    return path


def test_the_table_has_a_row_for_each_policy_and_capacity(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", trace, "--capacity", "16M,2M"]) == 0
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines()[3:] if line and "knowing" not in line]
    names = ["lru", "cost", "belady", "bound"] * 2 + ["infinite"]
    assert [next(word for word in row if word in names) for row in rows] == names
    assert [" ".join(row[:2]) for row in (rows[0], rows[4])] == ["2 MiB", "16 MiB"]
    assert rows[-1][0] == "unbounded"
    assert "480 look-ups of 24 entries (13.5 MiB)" in shown.out
    assert shown.err == "", "no progress where nobody watches"


def test_programs_get_the_same_as_data(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", trace, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lookups"], found["entries"], found["recorded_capacity"]) == (480, 24, 8 << 20)
    ratios = {(each["policy"], each["capacity"]): each["hit_ratio"] for each in found["outcomes"]}
    assert {capacity for _, capacity in ratios} == {2 << 20, 4 << 20, 8 << 20, 16 << 20, 32 << 20, None}
    assert ratios["lru", 8 << 20]["lookups"] == 0, "a loop that does not fit"
    assert ratios["cost", 8 << 20]["seconds"] > 0.7, "the small dear entries stay"
    assert ratios["infinite", None]["lookups"] == pytest.approx(456 / 480)


def test_a_plot_is_drawn(trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an optional package; needed for this test alone")
    assert cli.main(["simulate", trace, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["missing/plot.png", "plot.unknown"])
def test_a_plot_that_cannot_be_written_is_an_error(
    name: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="an optional package; needed for this test alone")
    assert cli.main(["simulate", trace, "--plot", str(tmp_path / name)]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_an_error_that_says_so(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["simulate", trace, "--plot", "plot.png"]) == 1
    assert "needs matplotlib" in capsys.readouterr().err


def test_a_damaged_trace_is_an_error_with_its_line(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(trace)
    path.write_bytes(path.read_bytes()[:-20])
    assert cli.main(["simulate", trace]) == 1
    assert capsys.readouterr().err == "vlcache simulate: line 481: cut off, or longer than 4096 characters\n"


@pytest.mark.parametrize("text", ["", "G", "1X", "0", "-1G", "1G,,2G", "1e9", "nan", "1G;2G", "٣G"])
def test_a_bad_capacity_is_an_error(text: str, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", trace, f"--capacity={text}"]) == 2
    assert "is no size" in capsys.readouterr().err


def test_capacities_are_read_in_the_usual_ways() -> None:
    assert capacities_of("1G, 512M,1.5g,1GiB,100") == [100, 512 << 20, 1 << 30, 3 << 29]
    assert [size(n) for n in (0, 5, 1 << 10, 1536, 5 << 30, 1 << 50)] == [
        "0 B",
        "5 B",
        "1 KiB",
        "1.5 KiB",
        "5 GiB",
        "1024 TiB",
    ]
