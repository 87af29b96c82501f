"""Answers about host memory that copies of a device read or write: given when these are done."""

from typing import Generic, TypeVar

import torch

from vlcache_connector.exec.upload import upload_stream

T = TypeVar("T")


class Late(Generic[T]):
    """Holds what a step has to say until the copies that it began are done. Nobody waits for them within the step: it
    is said one step later, so in the same step on all ranks, unless it is taken before. A CPU has done what it was
    told, and says it at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: tuple[torch.cuda.Event, T] | None = None

    def exchange(self, answer: T | None) -> T | None:
        """Hand in the answer of the step that ends, get the one that may be given."""
        if self._device.type != "cuda":
            return answer
        due = self.take()
        if answer is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(upload_stream(self._device))
            self._last = current.record_event(), answer
        return due

    def take(self, waits: bool = True) -> T | None:
        """The answer of the last step as soon as it is true; None when it is not yet, and nobody `waits`."""
        if self._last is None or not (waits or self._last[0].query()):
            return None
        (event, answer), self._last = self._last, None
        event.synchronize()
        return answer
