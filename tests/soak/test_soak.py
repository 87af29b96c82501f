"""A short soak: one server, planted faults, every answer checked. `make soak` is the long one."""

from pathlib import Path

from soak.settings import Settings
from soak.soak import run


def test_a_short_soak_keeps_what_is_promised(tmp_path: Path) -> None:
    """Small in every way, so that its 150 requests see evictions, full pages and some thirty faults."""
    report = run(
        Settings(
            requests=150,
            scenes=24,
            pictures=16,
            host_mib=6.0,
            blocks=54,
            fault_rate=0.02,
            folder=str(tmp_path / "soak"),
        )
    )
    print(report.text())
    assert not report.broken, "\n".join(report.broken)
    assert report.answers["wrong"] == 0
    compared = sum(count for name, count in report.requests.items() if name.startswith("compared: "))
    assert compared > 75
