"""Muon (Jordan et al. 2024) for the matrices, Adam for embeddings and norms, in one small optimizer.

Newton-Schulz runs once per shape, on all matrices of that shape.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ADAM_RATE = 0.15  # relative to the rate of the matrices
BETA_1, BETA_2 = 0.9, 0.98


def orthogonalised(update: Tensor, iterations: int = 5) -> Tensor:
    """About the nearest (semi-)orthogonal matrices of `update` (n, rows, columns)."""
    tall = update.shape[1] > update.shape[2]
    x = update.transpose(1, 2) if tall else update
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    result: Tensor = x.transpose(1, 2) if tall else x
    return result


class Muon:
    """`state` holds two averages of each parameter, by its name and `.0` or `.1`, and the number of steps."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.matrices: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            if parameter.ndim == 2 and "embed" not in name:
                self.matrices[parameter.shape].append(name)
        self.state = {f"{n}.{i}": torch.zeros_like(p) for n, p in self.parameters.items() for i in range(2)}
        self.state["count"] = torch.zeros(())

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Moves the parameters by their gradients and drops these."""
        self.state["count"] += 1
        others = self.parameters.keys() - {name for names in self.matrices.values() for name in names}
        for shape, names in self.matrices.items():
            updates = torch.stack([self.momentum(name) for name in names])
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for name, update in zip(names, orthogonalised(updates), strict=True):
                self.parameters[name].sub_(update, alpha=rate * scale)
        for name in sorted(others):
            self.adam(name, rate * ADAM_RATE)
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradient(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def momentum(self, name: str) -> Tensor:
        gradient, average = self.gradient(name), self.state[f"{name}.0"]
        average.lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(average, MOMENTUM)

    def adam(self, name: str, rate: float) -> None:
        parameter, first, second = self.parameters[name], self.state[f"{name}.0"], self.state[f"{name}.1"]
        gradient = self.gradient(name)
        first.lerp_(gradient, 1 - BETA_1)
        second.lerp_(gradient**2, 1 - BETA_2)
        count = int(self.state["count"])
        correction = (1 - BETA_2**count) ** 0.5 / (1 - BETA_1**count)
        parameter.sub_(first / (second.sqrt() + 1e-8), alpha=rate * correction)
