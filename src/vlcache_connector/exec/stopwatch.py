"""Measures work on a device without waiting for it."""

import time
from dataclasses import dataclass

import torch


@dataclass(slots=True, eq=False)
class _Lap:
    num_tokens: int
    start: "torch.cuda.Event | float"
    end: "torch.cuda.Event | float"


class Stopwatch:
    """Seconds that pieces of work took; on CUDA from one point of the stream to another, known once passed."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._start: torch.cuda.Event | float | None = None
        self._laps: list[_Lap] = []

    def start(self) -> None:
        self._start = self._now()

    def stop(self, num_tokens: int) -> None:
        """End of the work that began with the latest `start`; without one, nothing is measured."""
        if self._start is not None:
            self._laps.append(_Lap(num_tokens, self._start, self._now()))
            self._start = None

    def extend(self, num_tokens: int) -> None:
        """The work that ended with the latest `stop` was of so many tokens more."""
        if self._laps:
            self._laps[-1].num_tokens += num_tokens

    def take(self) -> list[tuple[int, float]]:
        """(tokens, seconds) of all work that has ended on the device."""
        ended = [lap for lap in self._laps if isinstance(lap.end, float) or lap.end.query()]
        self._laps = [lap for lap in self._laps if lap not in ended]
        return [(lap.num_tokens, _seconds(lap)) for lap in ended]

    def _now(self) -> "torch.cuda.Event | float":
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(lap: _Lap) -> float:
    if isinstance(lap.start, float) or isinstance(lap.end, float):
        assert isinstance(lap.start, float) and isinstance(lap.end, float)
        return lap.end - lap.start
    return float(lap.start.elapsed_time(lap.end)) / 1000
