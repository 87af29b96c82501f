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

    def rotate(self, keys: torch.Tensor, delta: int) -> torch.Tensor:
        """Keys of shape [..., head_dim] moved by `delta` positions: rotated in fp32, rounded once to their dtype.

        A delta of 0 returns the argument itself, bit for bit. Dimensions past `rotary_dim` are copied.
        """
        if delta == 0:
            return keys
        # Angles in fp64: delta * inv_freq can be many turns, and fp32 would lose the fraction that matters.
        angle = (self.inv_freq.double() * delta).to(keys.device)
        cos, sin = angle.cos().float(), angle.sin().float()
        rotary, rest = keys[..., : self.rotary_dim].float(), keys[..., self.rotary_dim :]
        x, y = rotary.chunk(2, dim=-1) if self.is_neox else (rotary[..., 0::2], rotary[..., 1::2])
        a, b = x * cos - y * sin, y * cos + x * sin
        turned = torch.cat((a, b), dim=-1) if self.is_neox else torch.stack((a, b), dim=-1).flatten(-2)
        return torch.cat((turned.to(keys.dtype), rest), dim=-1)


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
