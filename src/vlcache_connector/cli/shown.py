"""How numbers, tables and progress are shown to people."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vlcache_connector.store.control.protocol import ControlError, Message

ABSENT = "-"


def size(nbytes: int | None) -> str:
    """Bytes in binary units, with at most four characters of number."""
    if nbytes is None:
        return ABSENT
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 999.5 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}" if unit != "B" and value < 9.95 else f"{value:.0f} {unit}"


def age(seconds: float | None) -> str:
    """A length of time in its largest whole unit."""
    if seconds is None:
        return ABSENT
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


def number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[str]) -> Iterator[str]:
    """Aligned lines under the titles; columns whose title is in `right` are numbers."""
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    for row in (titles, *rows):
        cells = zip(row, widths, titles, strict=True)
        yield "  ".join(f"{cell:>{w}}" if title in right else f"{cell:<{w}}" for cell, w, title in cells).rstrip()


class Progress:
    """A bar where somebody sits before it."""

    def __init__(self, what: str, unit: str, total: int) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._bar: Any = None

    def show(self, count: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm  # comes with vLLM

            self._bar = tqdm(desc=self._what, total=self._total, initial=count, unit=self._unit, leave=False)
        self._bar.update(count - self._bar.n)

    def say(self, line: str) -> None:
        """On standard error, above the bar."""
        if self._bar is None:
            print(line, file=sys.stderr)
        else:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def watched(messages: Iterator[Message], what: str) -> Any:
    """The result of a command; its progress is a bar where somebody sits before it."""
    bar: Any = None
    try:
        for message in messages:
            if "result" in message:
                return message["result"]
            if (progress := message.get("progress")) and sys.stderr.isatty():
                bar = _bar(what, progress["unit"]) if bar is None else bar
                bar.total = progress["total"]
                bar.update(progress["done"] - bar.n)
    finally:
        if bar is not None:
            bar.close()
    raise ControlError("the command ended without a result")


def _bar(what: str, unit: str) -> Any:
    from tqdm import tqdm  # comes with vLLM

    return tqdm(desc=what, unit=unit, unit_scale=True, unit_divisor=1024 if unit == "B" else 1000, leave=False)
