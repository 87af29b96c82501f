"""Memory and open files of the server's processes over time."""

import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil

INTERVAL_S = 2.0
MIN_SAMPLES = 30
"""Fewer say nothing about a trend: caches are still being filled."""
MAX_GROWTH = 0.03
MAX_GROWTH_NBYTES = 16 << 20
"""What the median of the last third may exceed that of the middle third by: allocators and counters breathe."""
MAX_MORE_FILES = 20
"""A connection of each client, and what a step opens for a moment."""


@dataclass(frozen=True)
class Sample:
    at_s: float
    rss: dict[str, int]  # bytes, by process
    num_files: int


class Watch:
    """Samples the tree of one process until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._start = time.monotonic()
        self._over = threading.Event()
        self.samples: list[Sample] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(INTERVAL_S):
            rss: dict[str, int] = {}
            num_files = 0
            try:
                for process in (self._root, *self._root.children(recursive=True)):
                    rss[f"{process.name()} {process.pid}"] = process.memory_info().rss
                    num_files += process.num_fds()
            except psutil.Error:  # a process has just ended; the next sample shows that
                continue
            self.samples.append(Sample(time.monotonic() - self._start, rss, num_files))

    def summary(self) -> dict[str, Any]:
        middle, last = thirds(self.samples)
        return {
            "samples": len(self.samples),
            "rss_mib": [[round(s.at_s), round(sum(s.rss.values()) / 2**20)] for s in _thinned(self.samples)],
            "rss_mib_of": {name: [_median_of(part, name) for part in (middle, last)] for name in _names(last)},
            "rss_middle_mib": _median_rss(middle) / 2**20,
            "rss_last_mib": _median_rss(last) / 2**20,
            "files_middle": max((s.num_files for s in middle), default=0),
            "files_last": max((s.num_files for s in last), default=0),
        }

    def problems(self) -> list[str]:
        if len(self.samples) < MIN_SAMPLES:
            return []
        found = []
        middle, last = thirds(self.samples)
        before, now = _median_rss(middle), _median_rss(last)
        if now > before * (1 + MAX_GROWTH) + MAX_GROWTH_NBYTES:
            found.append(f"memory grows: {before / 2**20:.0f} MiB in the middle third, {now / 2**20:.0f} in the last")
        files, files_now = (max(s.num_files for s in part) for part in (middle, last))
        if files_now > files + MAX_MORE_FILES:
            found.append(f"open files grow: {files} in the middle third, {files_now} in the last")
        names = [set(sample.rss) for sample in (self.samples[0], self.samples[-1])]
        if names[0] - names[1]:
            found.append(f"processes ended: {sorted(names[0] - names[1])}")
        return found


def thirds(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The middle and the last third."""
    third = len(samples) // 3
    return samples[third : 2 * third], samples[2 * third :]


def _names(samples: list[Sample]) -> list[str]:
    return sorted(samples[-1].rss) if samples else []


def _median_of(samples: list[Sample], name: str) -> int:
    return round(statistics.median([s.rss.get(name, 0) for s in samples] or [0]) / 2**20)


def _median_rss(samples: list[Sample]) -> float:
    return statistics.median(sum(s.rss.values()) for s in samples) if samples else 0.0


def _thinned(samples: list[Sample], most: int = 60) -> list[Sample]:
    return samples[:: -(-len(samples) // most)] if samples else []
