"""The optimizers, each beside its formula. What torch.optim has is torch's; the full-batch descent is ours.

theta are the parameters, a the learning rate, J the loss over all data, J_i over the rows of one batch, g its gradient.

    gd        theta <- theta - a grad J(theta)                          every step sees all rows
    sgd       theta <- theta - a grad J(theta; x_i)                     Robbins and Monro 1951
    momentum  v <- m v + g;  theta <- theta - a v                       Polyak 1964
              (nesterov: theta <- theta - a (g + m v))                  Nesterov 1983
    adam      m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
              theta <- theta - a (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + e)   Kingma and Ba 2015, algorithm 1
    adamw     theta <- theta - a w theta, then adam                     Loshchilov and Hutter 2019, algorithm 2

docs/algorithms.md states them at length. Knows nothing of models or schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import torch

from steelyard.errors import ConfigError


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which optimizer, and its settings; one that it does not have is refused by name."""

    name: str = "adamw"
    """gd, sgd, momentum, adam or adamw."""
    learning_rate: float = 4e-4
    """a."""
    momentum: float | None = None
    """momentum: m, 0.9 by default."""
    nesterov: bool | None = None
    """momentum: look ahead (Nesterov)."""
    betas: tuple[float, float] | None = None
    """adam, adamw: b1 and b2, (0.9, 0.999) by default."""
    epsilon: float | None = None
    """adam, adamw: e, 1e-8 by default."""
    weight_decay: float | None = None
    """adamw: w, 0.01 by default; it shrinks matrices only, never biases and norms."""


class GradientDescent(torch.optim.Optimizer):
    """theta <- theta - a grad J(theta). The gradient is that of all rows: the trainer sees to it."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step down the gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is not None:
                    theta -= group["lr"] * theta.grad
        return loss


def _gd(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return GradientDescent(groups, lr=config.learning_rate)


def _sgd(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.learning_rate)


def _momentum(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    momentum = 0.9 if config.momentum is None else config.momentum
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=momentum, nesterov=bool(config.nesterov))


def _adam(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=config.learning_rate, betas=_betas(config), eps=_epsilon(config))


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=_betas(config), eps=_epsilon(config))


# name: (builder, the settings it takes besides the learning rate)
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], frozenset[str]]] = {
    "gd": (_gd, frozenset()),
    "sgd": (_sgd, frozenset()),
    "momentum": (_momentum, frozenset({"momentum", "nesterov"})),
    "adam": (_adam, frozenset({"betas", "epsilon"})),
    "adamw": (_adamw, frozenset({"betas", "epsilon", "weight_decay"})),
}


def build(parameters: Iterable[torch.Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer over `parameters`.

    Raises:
        ConfigError: an unknown name, a setting that this optimizer does not have, or one out of range.
    """
    check(config)
    builder, _ = OPTIMIZERS[config.name]
    decay = 0.01 if config.weight_decay is None else config.weight_decay
    matrices: list[torch.Tensor] = []
    vectors: list[torch.Tensor] = []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors}]
    if config.name == "adamw":
        groups[0]["weight_decay"], groups[1]["weight_decay"] = decay, 0.0
    return builder([group for group in groups if group["params"]], config)


def check(config: OptimizerConfig) -> None:
    """Refuse what cannot be built; see `build`."""
    if config.name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name '{config.name}' is not known; known: {', '.join(OPTIMIZERS)}")
    _, takes = OPTIMIZERS[config.name]
    for field in ("momentum", "nesterov", "betas", "epsilon", "weight_decay"):
        if getattr(config, field) is not None and field not in takes:
            known = ", ".join(sorted(takes)) or "none but learning_rate"
            raise ConfigError(f"optimizer.{field} means nothing to {config.name}; its settings: {known}")
    if not 0 < config.learning_rate < math.inf:
        raise ConfigError(f"optimizer.learning_rate must be above 0, not {config.learning_rate}")
    for field in ("momentum", "epsilon", "weight_decay"):
        value = getattr(config, field)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"optimizer.{field} must be at least 0, not {value}")
    if config.nesterov and config.momentum == 0:
        raise ConfigError("optimizer.nesterov needs a momentum above 0")
    if not all(0 <= beta < 1 for beta in _betas(config)):
        raise ConfigError("optimizer.betas must be at least 0 and below 1")


def _betas(config: OptimizerConfig) -> tuple[float, float]:
    return config.betas or (0.9, 0.999)


def _epsilon(config: OptimizerConfig) -> float:
    return 1e-8 if config.epsilon is None else config.epsilon
