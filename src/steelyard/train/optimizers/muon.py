"""Muon: the momentum of a matrix, orthogonalised (Jordan et al. 2024); what is no hidden matrix takes AdamW.

Its step is scaled by 0.2 sqrt(max(A, B)) to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training",
equation 4), so one learning rate serves both.
"""

# A rows  B columns

from __future__ import annotations

import math
from typing import Any

import torch

from steelyard.train.optimizers.descent import Descent

QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """`[A, B]` -> a matrix with the same singular vectors whose singular values are near 1, by Newton and Schulz.

    Computed in bfloat16, which is enough for a direction; a float64 matrix keeps its dtype.
    """
    a, b, c = QUINTIC
    x = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    if turned := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if turned else x


class Muon(Descent):
    """Groups with `matrices` true take v <- m v + g; theta <- theta - a (w theta + s orthogonal(g + m v)).

    The others take AdamW. A kernel of more dimensions is a matrix of its outputs and the rest.
    """

    def __init__(self, groups: Any, lr: float, momentum: float, betas: tuple[float, float], epsilon: float) -> None:
        settings = {"lr": lr, "momentum": momentum, "betas": betas, "epsilon": epsilon}
        super().__init__(groups, {**settings, "weight_decay": 0.0, "matrices": False})

    def update(self, theta: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """See the class."""
        theta.mul_(1 - group["lr"] * group["weight_decay"])
        if group["matrices"]:
            self._orthogonal(theta, gradient, group, state)
        else:
            self._adam(theta, gradient, group, state)

    def _orthogonal(
        self, theta: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(theta)
        velocity = state["momentum"].mul_(group["momentum"]).add_(gradient)
        ahead = gradient.add(velocity, alpha=group["momentum"]).flatten(1)
        scale = 0.2 * math.sqrt(max(ahead.shape))
        theta.sub_(orthogonalize(ahead).to(theta.dtype).view_as(theta), alpha=group["lr"] * scale)

    def _adam(self, theta: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(theta), torch.zeros_like(theta)
        b1, b2 = group["betas"]
        state["step"] += 1
        step = float(state["step"])
        mean, square = state["mean"].lerp_(gradient, 1 - b1), state["square"]
        square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        size = (square / (1 - b2**step)).sqrt_().add_(group["epsilon"])
        theta.addcdiv_(mean, size, value=-group["lr"] / (1 - b1**step))
