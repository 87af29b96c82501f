"""Re-positioning of stored keys: RoPE is a rotation, so K(p + delta) = R(delta) K(p).

One delta turns all positions of a span, also under M-RoPE: when every channel of a token's position moves by the same
amount, the angle of each frequency changes by `delta * inv_freq`, whichever channel that frequency belongs to.
"""

from dataclasses import dataclass, field

import torch

from vlcache_connector.errors import PositionMismatchError


@dataclass(frozen=True, slots=True)
class Rope:
    """The pure rotation of a model's rotary embedding (no attention factor: stored keys carry that already).

    `inv_freq` has shape [rotary_dim / 2], fp32. `is_neox`: pairs are (i, i + rotary_dim / 2), else (2i, 2i + 1).
    `channels` [rotary_dim / 2] int64: which channel of a position turns each pair; all the first one by default.
    """

    inv_freq: torch.Tensor
    is_neox: bool
    channels: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.numel()

    def turns(self, delta: int, device: torch.device) -> torch.Tensor:
        """Cosines and sines [2, rotary_dim / 2], fp32, of the angles that move keys by `delta` positions."""
        # Angles in fp64: delta * inv_freq can be many turns, and fp32 would lose the fraction that matters.
        angle = self.inv_freq.double().cpu() * delta
        return torch.stack((angle.cos(), angle.sin())).float().to(device)

    def places(self, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Cosines and sines [tokens, 2, rotary_dim / 2], fp32, of keys at `positions` [channels, tokens]."""
        # An image has few different positions, its rows and columns, and a cosine in fp64 takes long.
        different, number = positions.cpu().unique(return_inverse=True)
        angle = different.double()[:, None] * self.inv_freq.double().cpu()
        table = torch.stack((angle.cos(), angle.sin()), dim=1).float().to(device)
        rows = number.to(device)[self.channels.expand(self.inv_freq.numel()).to(device)].T  # [tokens, rotary_dim / 2]
        return table.gather(0, rows[:, None].expand(-1, 2, -1))

    def turned_back(self, keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Keys [tokens, heads, dim] at `places` as they were before the layer turned them, in fp32."""
        cos, sin = places[:, None, 0], places[:, None, 1]
        rows = keys.float()
        rotary, rest = rows[..., : self.rotary_dim], rows[..., self.rotary_dim :]
        x, y = rotary.chunk(2, dim=-1) if self.is_neox else (rotary[..., 0::2], rotary[..., 1::2])
        a, b = torch.addcmul(x * cos, y, sin), torch.addcmul(y * cos, x, sin, value=-1)
        back = (a, b) if self.is_neox else (torch.stack((a, b), dim=-1).flatten(-2),)
        return torch.cat((*back, rest), dim=-1)


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
