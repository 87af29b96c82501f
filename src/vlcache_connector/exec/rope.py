"""Re-positioning of stored keys: RoPE is a rotation, so K(p + delta) = R(delta) K(p).

One delta turns all positions of a span, also under M-RoPE: when every channel of a token's position moves by the same
amount, the angle of each frequency changes by `delta * inv_freq`, whichever channel that frequency belongs to.
"""

from dataclasses import dataclass

import torch

from vlcache_connector.errors import PositionMismatchError


@dataclass(frozen=True, slots=True)
class Rope:
    """The pure rotation of a model's rotary embedding (no attention factor: stored keys carry that already).

    `inv_freq` has shape [rotary_dim / 2], fp32. `is_neox`: pairs are (i, i + rotary_dim / 2), else (2i, 2i + 1).
    """

    inv_freq: torch.Tensor
    is_neox: bool

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.numel()

    def turns(self, delta: int, device: torch.device) -> torch.Tensor:
        """Cosines and sines [2, rotary_dim / 2], fp32, of the angles that move keys by `delta` positions."""
        # Angles in fp64: delta * inv_freq can be many turns, and fp32 would lose the fraction that matters.
        angle = self.inv_freq.double().cpu() * delta
        return torch.stack((angle.cos(), angle.sin())).float().to(device)


def position_delta(stored: torch.Tensor, wanted: torch.Tensor) -> int:
    """The one delta by which all positions [channels, tokens] moved. Raises `PositionMismatchError` when there is
    none.
    """
    deltas = wanted.to(torch.int64) - stored.to(torch.int64)
    delta = int(deltas.flatten()[0])
    if not bool((deltas == delta).all()):
        low, high = int(deltas.min()), int(deltas.max())
        raise PositionMismatchError(f"positions moved by different amounts, {low} to {high}; the span is not reused")
    return delta
