"""Times on a device, of functions that are compared, taken in turns. On a CPU (for rehearsals) it is the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

FLUSHED_NBYTES = 256 << 20  # several times the L2 cache of any GPU


class Clock:
    """Measures functions that work on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scratch = torch.empty(FLUSHED_NBYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def on_device_in_turns(self, functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        """Seconds that the device works for each function in each repeat, its caches emptied before. What the host does
        meanwhile is hidden: the device is still busy with emptying its caches.
        """
        if self._device.type != "cuda":
            return self.by_wall_in_turns(functions, repeats)
        for function in functions.values():
            function()
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self._scratch.zero_()
                start.record()
                function()
                end.record()
                events[name].append((start, end))
            torch.cuda.synchronize(self._device)
        return {name: [1e-3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}

    def by_wall_in_turns(self, functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        """Seconds from the call of each function until the device is done, in each repeat."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        for repeat in range(repeats + 1):
            for name, function in functions.items():
                self.wait()
                started = time.perf_counter()
                function()
                self.wait()
                if repeat:  # the first one warms up
                    times[name].append(time.perf_counter() - started)
        return times

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
