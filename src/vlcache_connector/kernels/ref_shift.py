"""Plain-PyTorch twin of `ops.shift_rows`."""

import torch

from vlcache_connector.kernels import ref_pages as pages


def shift_rows(
    out: torch.Tensor,
    entry: torch.Tensor,
    shift: torch.Tensor,
    places: torch.Tensor,
    turns: torch.Tensor | None,
    is_neox: bool,
) -> None:
    """See `ops.shift_rows`."""
    _require(out, entry, shift, places, turns)
    keys, values = entry[0].float(), entry[1].float() + shift[1].float()
    half = places.shape[2]
    turned = _rotated(shift[0].float(), places[:, None, 0], places[:, None, 1], half, is_neox)
    if turns is not None:
        keys = _rotated(keys, turns[0], turns[1], half, is_neox)
    out[0] = pages.rounded(keys + turned, out.dtype)
    out[1] = pages.rounded(values, out.dtype)


def _rotated(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int, is_neox: bool) -> torch.Tensor:
    rotary, rest = rows[..., : 2 * half], rows[..., 2 * half :]
    x, y = rotary.chunk(2, dim=-1) if is_neox else (rotary[..., 0::2], rotary[..., 1::2])
    a, b = x * cos - y * sin, y * cos + x * sin
    both = torch.cat((a, b), dim=-1) if is_neox else torch.stack((a, b), dim=-1).flatten(-2)
    return torch.cat((both, rest), dim=-1)


def _require(
    out: torch.Tensor, entry: torch.Tensor, shift: torch.Tensor, places: torch.Tensor, turns: torch.Tensor | None
) -> None:
    """Raises `RuntimeError` naming the argument that is wrong."""
    pages.require_float("entry", entry)
    pages.require_shape("entry", entry, [2, -1, -1, -1])
    pages.require_dense_rows("entry", entry)
    for name, rows in (("out", out), ("shift", shift)):
        same = rows.dtype == entry.dtype
        pages.require(same, f"{name}: expected {pages.type_name(entry.dtype)}, found {pages.type_name(rows.dtype)}")
        pages.require_shape(name, rows, list(entry.shape))
        pages.require_device(name, rows, entry)
        pages.require_dense_rows(name, rows)
    pages.require_vector("places", places, torch.float32, [entry.shape[1], 2, -1], entry)
    angles, most = places.shape[2], entry.shape[3] // 2
    pages.require(angles <= most, f"places: expected at most dim / 2 = {most} angles, found {angles}")
    if turns is not None:
        pages.require_vector("turns", turns, torch.float32, [2, angles], entry)
