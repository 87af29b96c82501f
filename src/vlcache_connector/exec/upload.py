"""Layers of an entry on their way from host memory to the device, ahead of their use and beside its other work."""

from functools import cache

import torch

_AHEAD = 3
"""Layers on their way or in use."""


class Uploads:
    """The layers of an entry, asked for in ascending order. One is good until the next is asked for."""

    def __init__(self, entry: torch.Tensor, device: torch.device) -> None:
        self._entry, self._device = entry, device
        self._is_used_in_place = entry.device == device
        if self._is_used_in_place:
            return
        count, (_, *shape) = min(_AHEAD, len(entry)), entry.shape
        self._buffers = [torch.empty(shape, dtype=entry.dtype, device=device) for _ in range(count)]
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._asked = 0  # layers from here on were not asked for
        # Nothing is copied before what the buffers' memory was used for is over, and nobody gets that memory again
        # before the copies are.
        side = upload_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        for layer, buffer in enumerate(self._buffers):
            buffer.record_stream(side)
            self._start(layer)

    def __getitem__(self, layer: int) -> torch.Tensor:
        if self._is_used_in_place:
            return self._entry[layer]
        current = torch.cuda.current_stream(self._device)
        done = current.record_event()  # with all layers before
        for before in range(self._asked, layer):
            if before + len(self._buffers) < len(self._entry):
                upload_stream(self._device).wait_event(done)
                self._start(before + len(self._buffers))
        self._asked = layer
        current.wait_event(self._arrived.pop(layer))
        return self._buffers[layer % len(self._buffers)]

    def _start(self, layer: int) -> None:
        side = upload_stream(self._device)
        with torch.cuda.stream(side):
            self._buffers[layer % len(self._buffers)].copy_(self._entry[layer], non_blocking=True)
        self._arrived[layer] = side.record_event()


@cache
def upload_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all uploads to a device."""
    return torch.cuda.Stream(device)
