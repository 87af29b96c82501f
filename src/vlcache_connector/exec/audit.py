"""An audit: what a prompt's KV and its first answer token would be with reuse, against what full computation gives.

One rank's part. Both versions are made in the same scratch blocks, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vlcache_connector.exec.pages import Pages
from vlcache_connector.exec.recompute import Recompute
from vlcache_connector.exec.sequence import SequenceInput
from vlcache_connector.kernels.ops import save_rows
from vlcache_connector.types import Run

_MAX_COMPARED = 1024
"""Reused tokens whose KV is compared, spread evenly: the first version waits in host memory for the second."""
Sums = tuple[tuple[float, float], ...]
"""Of each layer: a sum over its keys, and one over its values."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What one rank found, or several of them together."""

    differences: Sums  # squared differences of the reused tokens' KV from the true one
    squares: Sums  # squares of the true one
    kl: float | None  # KL(true || with reuse) of the first token, in nats; None where a rank has no logits
    is_same_token: bool | None  # whether both versions find the same token likeliest

    def merged(self, other: "Drift") -> "Drift":
        """Ranks hold different heads, and the same logits or none."""
        mine = self if self.kl is not None else other
        return Drift(
            _added(self.differences, other.differences),
            _added(self.squares, other.squares),
            mine.kl,
            mine.is_same_token,
        )

    @property
    def distances(self) -> tuple[float, ...]:
        """Of each layer: relative L2 distance of keys and of values, their root mean square."""
        pairs = zip(self.differences, self.squares, strict=True)
        return tuple((sum(d / max(s, 1e-30) for d, s in zip(*pair, strict=True)) / 2) ** 0.5 for pair in pairs)


def audit(recompute: Recompute, pages: Pages, with_reuse: SequenceInput, reused: Sequence[Run]) -> Drift:
    """Compute a prompt both ways.

    Args:
        with_reuse: the prompt to its end; `reused` tokens lie in its blocks already, or are loaded during its pass.
        reused: what is not in its runs.
    """
    num_tokens = len(with_reuse.token_ids)
    slots = pages.slots(with_reuse.block_ids, reused, 0, num_tokens)
    slots = slots[slots >= 0]
    slots = slots[:: -(-len(slots) // _MAX_COMPARED) or 1].contiguous()
    logits = recompute.last_logits(with_reuse)
    found = _read(pages, slots)
    everything = replace(with_reuse, runs=(Run(0, num_tokens),), whole=(), narrowed=(), question=None, shifted={})
    true_logits = recompute.last_logits(everything)
    kl, is_same_token = _divergence(true_logits, logits)
    differences, squares = _sums(found, _read(pages, slots))
    return Drift(differences, squares, kl, is_same_token)


def _read(pages: Pages, slots: torch.Tensor) -> torch.Tensor:
    """KV [layers, 2, tokens, heads, dim] of some tokens, on the CPU."""
    shape = (len(pages.caches), 2, len(slots), *pages.row_shape)
    kept = torch.empty(shape, dtype=pages.dtype)
    for layer, cache in enumerate(pages.caches):
        staged = torch.empty((1, *shape[1:]), dtype=pages.dtype, device=pages.device)
        save_rows(staged, (cache,), slots, pages.layout)
        kept[layer].copy_(staged[0])
    return kept


def _sums(found: torch.Tensor, true: torch.Tensor) -> tuple[Sums, Sums]:
    differences, squares = list[tuple[float, float]](), list[tuple[float, float]]()
    for ours, theirs in zip(found, true, strict=True):
        differences.append(_squared(ours.double() - theirs.double()))
        squares.append(_squared(theirs.double()))
    return tuple(differences), tuple(squares)


def _squared(rows: torch.Tensor) -> tuple[float, float]:
    keys, values = rows.square().sum(dim=(1, 2, 3)).tolist()
    return keys, values


def _divergence(true: torch.Tensor | None, other: torch.Tensor | None) -> tuple[float | None, bool | None]:
    """KL(true || other) of logits [vocabulary], and whether their largest is the same."""
    if true is None or other is None:
        return None, None
    true_log, other_log = (logits.double().log_softmax(-1) for logits in (true, other))
    kl = torch.nn.functional.kl_div(other_log, true_log, reduction="sum", log_target=True)
    return float(kl), bool(true_log.argmax() == other_log.argmax())


def _added(one: Sums, other: Sums) -> Sums:
    return tuple((a[0] + b[0], a[1] + b[1]) for a, b in zip(one, other, strict=True))
