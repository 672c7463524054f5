"""Muon, the optimizer of the matrices between layers: a step along the nearest orthogonal matrix of the momentum.

``torch.optim.Muon`` does the same, but in bfloat16 and one matrix after the other. On a processor without instructions
for bfloat16 it took six times as long as the forward and backward pass together; here matrices of one shape are taken
at once, in the numbers that the processor is quick with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's Muon: steepest at 0, so that few steps are enough
STEPS = 4


def orthogonal(matrices: Any, dtype: Any) -> Any:
    """About U·Vᵀ of each of (n, rows, columns) = U·S·Vᵀ, by Newton and Schulz: X ← a·X + b·(X·Xᵀ)·X + c·(X·Xᵀ)²·X."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.transpose(1, 2) if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """With Nesterov's momentum, steps as large as AdamW's would be (0.2·√(longer side)) and its weight decay."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float, momentum: float, dtype: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # there is no loss to give back
        for group in self.param_groups:
            by_shape: dict[Any, list[Any]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                ahead = []
                for parameter in parameters:
                    state = self.state[parameter]
                    mean = state.setdefault("momentum_buffer", torch.zeros_like(parameter.grad))
                    mean.lerp_(parameter.grad, 1 - group["momentum"])
                    ahead.append(parameter.grad.lerp(mean, group["momentum"]))
                size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for parameter, step in zip(parameters, orthogonal(torch.stack(ahead), self.dtype), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=size)
