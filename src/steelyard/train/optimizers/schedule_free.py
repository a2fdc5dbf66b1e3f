"""Schedule-free AdamW (Defazio et al. 2024, algorithm 1): an average of the iterates takes the schedule's place.

Gradients are taken at y, between the iterate z and the average x; what is evaluated and kept is x.
"""

from __future__ import annotations

from typing import Any

import torch

from steelyard.train.optimizers.descent import Descent


class ScheduleFree(Descent):
    """y = (1 - b1) z + b1 x;  z <- z - a g / (sqrt(v / (1 - b2^t)) + e) - a w y;  x <- (1 - c) x + c z.

    c is the share of this step's squared rate in the sum of all, so that a warm-up counts less. The parameters are y.
    """

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], epsilon: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "epsilon": epsilon, "weight_decay": 0.0})

    def update(self, theta: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """See the class."""
        if not state:
            state["step"], state["rates"] = torch.zeros(()), torch.zeros((), dtype=theta.dtype)
            state["iterate"], state["average"] = theta.clone(), theta.clone()
            state["square"] = torch.zeros_like(theta)
        rate, (b1, b2) = group["lr"], group["betas"]
        state["step"] += 1
        state["rates"] += rate**2
        share = rate**2 / max(float(state["rates"]), torch.finfo(theta.dtype).tiny)
        square = state["square"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        size = (square / (1 - b2 ** float(state["step"]))).sqrt_().add_(group["epsilon"])
        iterate, average = state["iterate"], state["average"]
        iterate.addcdiv_(gradient, size, value=-rate).sub_(theta, alpha=rate * group["weight_decay"])
        average.lerp_(iterate, share)
        theta.copy_(torch.lerp(iterate, average, b1))

    def averages(self) -> dict[torch.Tensor, torch.Tensor]:
        """For each parameter that has been changed, x: what the model is."""
        return {theta: state["average"] for theta, state in self.state.items()}
