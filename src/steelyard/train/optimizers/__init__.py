"""The optimizers, each beside its formula. What torch.optim has is torch's; the others are ours.

theta are the parameters, a the learning rate, J the loss over all data, J_i over the rows of one batch, g its gradient.

    gd        theta <- theta - a grad J(theta)                          every step sees all rows
    sgd       theta <- theta - a grad J(theta; x_i)                     Robbins and Monro 1951
    momentum  v <- m v + g;  theta <- theta - a v                       Polyak 1964
              (nesterov: theta <- theta - a (g + m v))                  Nesterov 1983
    adam      m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
              theta <- theta - a (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + e)   Kingma and Ba 2015, algorithm 1
    adamw     theta <- theta - a w theta, then adam                     Loshchilov and Hutter 2019, algorithm 2
    adafactor v of a matrix as the product of its rows' and columns' means      Shazeer and Stern 2018
    lion      the sign of an interpolated momentum                      Chen et al. 2023
    muon      the orthogonalised momentum of hidden matrices; adamw for the rest        Jordan et al. 2024
    schedule-free    adamw at a point between the iterate and its average           Defazio et al. 2024

docs/algorithms.md states them at length. Knows nothing of models or schedules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
import torch

from steelyard.errors import ConfigError
from steelyard.train.optimizers.descent import GradientDescent
from steelyard.train.optimizers.groups import GroupConfig, split
from steelyard.train.optimizers.lion import Lion
from steelyard.train.optimizers.muon import Muon
from steelyard.train.optimizers.schedule_free import ScheduleFree


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which optimizer, and its settings; one that it does not have is refused by name."""

    name: str = "adamw"
    """gd, sgd, momentum, adam, adamw, adafactor, lion, muon or schedule-free; auto decides, and says why."""
    learning_rate: float | None = None
    """a; by default what mostly suits the optimizer."""
    momentum: float | None = None
    """momentum: m, 0.9 by default; muon: 0.95."""
    nesterov: bool | None = None
    """momentum: look ahead (Nesterov)."""
    betas: tuple[float, float] | None = None
    """adam, adamw, muon, schedule-free: b1 and b2, (0.9, 0.999) by default; lion: (0.9, 0.99)."""
    epsilon: float | None = None
    """adam, adamw, muon, schedule-free: e, 1e-8 by default."""
    weight_decay: float | None = None
    """adamw, muon: w, 0.01 by default; adafactor, lion, schedule-free: 0. It shrinks matrices only, never biases and
    norms."""
    layer_decay: float = 1.0
    """Factor of the learning rate for each block further from the output."""
    unfreeze_epochs: float = 0.0
    """A block begins to learn so many epochs after the one above it; 0: all at once."""
    groups: tuple[GroupConfig, ...] = ()
    """Parameters that differ from the others; the first that matches a name counts."""


Groups = list[dict[str, Any]]


def _gd(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return GradientDescent(groups, lr=rate(config))


def _sgd(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=rate(config))


def _momentum(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    momentum = 0.9 if config.momentum is None else config.momentum
    return torch.optim.SGD(groups, lr=rate(config), momentum=momentum, nesterov=bool(config.nesterov))


def _adam(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=rate(config), betas=_betas(config), eps=_epsilon(config), fused=True)


def _adamw(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=rate(config), betas=_betas(config), eps=_epsilon(config), fused=True)


def _adafactor(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=rate(config))


def _lion(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return Lion(groups, lr=rate(config), betas=_betas(config))


def _muon(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    momentum = 0.95 if config.momentum is None else config.momentum
    return Muon(groups, rate(config), momentum, _betas(config), _epsilon(config))


def _schedule_free(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return ScheduleFree(groups, rate(config), _betas(config), _epsilon(config))


class Known(NamedTuple):
    """An optimizer that can be asked for."""

    build: Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]
    settings: frozenset[str]
    """Those that it takes besides the learning rate."""
    learning_rate: float
    """Where none is asked for."""
    weight_decay: float = 0.0
    """Where none is asked for."""
    betas: tuple[float, float] = (0.9, 0.999)


ADAM = frozenset({"betas", "epsilon"})
DECAY = frozenset({"weight_decay"})
OPTIMIZERS: dict[str, Known] = {
    "gd": Known(_gd, frozenset(), 0.1),
    "sgd": Known(_sgd, frozenset(), 0.1),
    "momentum": Known(_momentum, frozenset({"momentum", "nesterov"}), 0.05),
    "adam": Known(_adam, ADAM, 4e-4),
    "adamw": Known(_adamw, ADAM | DECAY, 4e-4, 0.01),
    "adafactor": Known(_adafactor, DECAY, 1e-2),
    "lion": Known(_lion, frozenset({"betas"}) | DECAY, 1e-4, 0.0, (0.9, 0.99)),
    "muon": Known(_muon, ADAM | DECAY | {"momentum"}, 2e-3, 0.01),
    "schedule-free": Known(_schedule_free, ADAM | DECAY, 1e-3),
}


def build(parameters: Mapping[str, torch.Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer over named parameters; its groups have `scale` and `start` besides (see `groups.split`).

    Raises:
        ConfigError: an unknown name, a setting that this optimizer does not have, or one out of range.
    """
    check(config)
    known = OPTIMIZERS[config.name]
    groups = split(
        parameters,
        config.groups,
        weight_decay=known.weight_decay if config.weight_decay is None else config.weight_decay,
        layer_decay=config.layer_decay,
        unfreeze_epochs=config.unfreeze_epochs,
    )
    return known.build(groups, config)


def rate(config: OptimizerConfig) -> float:
    """The peak learning rate that is asked for, or the optimizer's own."""
    return OPTIMIZERS[config.name].learning_rate if config.learning_rate is None else config.learning_rate


def check(config: OptimizerConfig) -> None:
    """Refuse what cannot be built; see `build`."""
    if config.name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name '{config.name}' is not known; known: {', '.join(OPTIMIZERS)}")
    takes = OPTIMIZERS[config.name].settings
    for field in ("momentum", "nesterov", "betas", "epsilon", "weight_decay"):
        if getattr(config, field) is not None and field not in takes:
            known = ", ".join(sorted(takes)) or "none but learning_rate"
            raise ConfigError(f"optimizer.{field} means nothing to {config.name}; its settings: {known}")
    if not 0 < rate(config) < math.inf:
        raise ConfigError(f"optimizer.learning_rate must be above 0, not {config.learning_rate}")
    for field in ("momentum", "epsilon", "weight_decay"):
        value = getattr(config, field)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"optimizer.{field} must be at least 0, not {value}")
    if config.nesterov and config.momentum == 0:
        raise ConfigError("optimizer.nesterov needs a momentum above 0")
    if not all(0 <= beta < 1 for beta in _betas(config)):
        raise ConfigError("optimizer.betas must be at least 0 and below 1")
    if not 0 < config.layer_decay <= 1:
        raise ConfigError(f"optimizer.layer_decay must be above 0 and at most 1, not {config.layer_decay}")
    if not 0 <= config.unfreeze_epochs < math.inf:
        raise ConfigError(f"optimizer.unfreeze_epochs must be at least 0, not {config.unfreeze_epochs}")
    for number, group in enumerate(config.groups):
        _check_group(group, f"optimizer.groups[{number}]", takes)


def _check_group(group: GroupConfig, path: str, takes: frozenset[str]) -> None:
    try:
        re.compile(group.match)
    except re.error as error:
        raise ConfigError(f"{path}.match is no regular expression: {error}") from None
    if not 0 <= group.scale < math.inf:
        raise ConfigError(f"{path}.scale must be at least 0, not {group.scale}")
    if group.weight_decay is not None and ("weight_decay" not in takes or not 0 <= group.weight_decay < math.inf):
        raise ConfigError(f"{path}.weight_decay must be at least 0, of an optimizer that has it")


def _betas(config: OptimizerConfig) -> tuple[float, float]:
    return config.betas or OPTIMIZERS[config.name].betas


def _epsilon(config: OptimizerConfig) -> float:
    return 1e-8 if config.epsilon is None else config.epsilon
