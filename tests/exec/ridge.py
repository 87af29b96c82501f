"""The oracle of `exec.content.weights` and `exec.shift`: ridge regression with an intercept, in double precision, as
least squares over a system that has the penalty as equations of its own.
"""

import numpy as np
import torch

PENALTY = 0.01


def fitted(
    features: torch.Tensor, samples: torch.Tensor, changes: torch.Tensor, penalty: float = PENALTY
) -> torch.Tensor:
    """What changes [samples, ...] of some tokens say of all: [tokens, ...], fp64. `features`: [tokens, features];
    `penalty`: relative to the samples' mean square.
    """
    rows, given = features.double().numpy(), changes.double().flatten(1).numpy()
    known = rows[samples.numpy()]
    absolute = penalty * np.square(known - known.mean(0)).sum(1).mean()
    width = rows.shape[1]
    system = np.block([[known, np.ones((len(known), 1))], [absolute**0.5 * np.eye(width), np.zeros((width, 1))]])
    right = np.concatenate([given, np.zeros((width, given.shape[1]))])
    slopes, *_ = np.linalg.lstsq(system, right, rcond=None)
    return torch.from_numpy(rows @ slopes[:-1] + slopes[-1]).unflatten(1, changes.shape[1:])


def condition(num_samples: int) -> float:
    """By how much rounding errors grow on the way to weights, at most: the squares of n samples are n times their mean
    where all lie on a line, and the penalty is `PENALTY` times it.
    """
    return num_samples / PENALTY + 1
