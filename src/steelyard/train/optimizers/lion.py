"""Lion: the sign of an interpolated momentum (Chen et al. 2023, algorithm 2). One moment, so half of Adam's memory."""

from __future__ import annotations

from typing import Any

import torch

from steelyard.train.optimizers.descent import Descent


class Lion(Descent):
    """c = b1 m + (1 - b1) g;  theta <- theta - a (sign(c) + w theta);  m <- b2 m + (1 - b2) g."""

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    def update(self, theta: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """See the class."""
        if not state:
            state["momentum"] = torch.zeros_like(theta)
        momentum, (b1, b2) = state["momentum"], group["betas"]
        direction = torch.lerp(gradient, momentum, b1).sign_()
        theta.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
        momentum.lerp_(gradient, 1 - b2)
