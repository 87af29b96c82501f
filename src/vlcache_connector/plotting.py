"""What all plots need: matplotlib, which is optional, and a file that can be written."""

from pathlib import Path
from typing import Any

from vlcache_connector.errors import VLCacheError


class PlotError(VLCacheError):
    """There can be no plot here."""


def require_matplotlib() -> None:
    """Raise `PlotError` now and not after minutes of work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError("a plot needs matplotlib: pip install matplotlib") from None


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format that the name's ending says. Raises `PlotError`."""
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PlotError(f"{path} cannot be written: {error}") from None
