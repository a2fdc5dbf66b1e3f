"""What the optimizers of our own share, and the plainest of them. Knows nothing of models or schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch


class Descent(torch.optim.Optimizer, ABC):
    """An optimizer that changes each parameter by itself; what it does to one is `update`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is not None:
                    self.update(theta, theta.grad, group, self.state[theta])
        return loss

    @abstractmethod
    def update(self, theta: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Change a parameter in place.

        Args:
            theta: the parameter.
            gradient: of the same shape.
            group: the settings; `lr` is the learning rate.
            state: what is remembered of this parameter, tensors by name; empty at first.
        """


class GradientDescent(Descent):
    """theta <- theta - a grad J(theta). The gradient is that of all rows: the trainer sees to it."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    def update(self, theta: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """One step down the gradient."""
        theta.sub_(gradient, alpha=group["lr"])
