"""What the tokens of a span hold, judged by their stored values: which of them stand for all, and how far each of the
others is like those.

A token's content decides how new text before it changes its KV: under a legend that renames colours, tokens of one
colour change alike. Values are compared, because keys hold positions besides: those of the layer in the middle, where
what a picture shows is known and what the question wants of it is not yet all there is.
"""

import torch

from vlcache_connector.types import num_ordered

_PROJECTED = 64
"""Distances are taken between random projections to so many numbers, which keep them within a tenth or so (Johnson and
Lindenstrauss 1984)."""
_RIDGE = 0.01
"""Penalty of the fit, relative to the samples' mean square. Answers are the same from 0.003 to 0.03."""
MAX_FITTED = 128
"""More samples than this are not weighed: the product of weights and changes would cost more than what it moves."""


def features(entry: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows [tokens, features] in the dtype of `entry` [layers, 2, tokens, heads, dim], on `device`."""
    return entry[(len(entry) - 1) // 2, 1].to(device, non_blocking=True).flatten(1)


def order_of(entry: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Tokens of a span such that the first n, for every n, differ from each other as much as may be: [`num_ordered`]
    int32, on `device`.

    The first is the most ordinary one, each other the one that is farthest from all before it (Gonzalez 1985).
    """
    rows = features(entry, device).float()
    rows = (rows - rows.mean(0)).nan_to_num(0.0, 0.0, 0.0)
    signs = torch.randint(0, 2, (rows.shape[1], _PROJECTED), generator=torch.Generator().manual_seed(0))
    rows = rows @ (2.0 * signs - 1).to(device)
    norms = rows.square().sum(1)
    order = torch.empty(num_ordered(len(rows)), dtype=torch.int64, device=device)
    order[0] = norms.argmin()
    distance = torch.full_like(norms, torch.inf)
    for i in range(1, len(order)):
        last = order[i - 1]
        torch.minimum(distance, norms + norms[last] - 2 * (rows @ rows[last]), out=distance)
        distance[order[:i]] = -torch.inf  # of all of them again: squares that overflow make NaN of what was there
        order[i] = distance.argmax()
    return order.int()


def weights(rows: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """How each token follows the samples: [tokens, samples], each row of sum 1, in the dtype of `rows`.

    Ridge regression from the samples' features to whatever is known of the samples (Hoerl and Kennard 1970), with an
    intercept: where features tell nothing, all weights are the same and the fit is the mean. Without samples there is
    nothing to follow.

    Args:
        rows: `features` of all tokens of a span.
        samples: numbers of the tokens whose change is known, [samples] int64.
    """
    if not len(samples):
        return rows.new_zeros(len(rows), 0)
    known = rows[samples].float()
    size = known.square().sum(1).mean()
    mean = known.mean(0)
    known = known - mean
    products = known @ known.T
    # Samples that hold the same differ by the rounding of their mean; no fit is to follow that.
    fp32 = torch.finfo(torch.float32)
    penalty = torch.maximum(_RIDGE * products.diagonal().mean(), fp32.eps * size).clamp_min(fp32.tiny)
    products.diagonal().add_(penalty)
    slopes: torch.Tensor = torch.linalg.solve_ex(products, known)[0].T  # [features, samples]; a check would wait
    fitted = (rows.float() - mean) @ slopes
    return (fitted + (1 - fitted.sum(1, keepdim=True)) / len(samples)).to(rows.dtype)
