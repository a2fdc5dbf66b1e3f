"""Every optimizer against its written formula, step by step in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from steelyard.errors import ConfigError
from steelyard.train import optimizers
from steelyard.train.config import DataConfig, TrainConfig, check
from steelyard.train.optimizers import OptimizerConfig

STEPS = 10
Tensors = list[torch.Tensor]
# Yields theta after each step, given the start, the gradient's function and the settings.
Formula = Callable[[Tensors, Callable[[Tensors], Tensors], dict[str, Any]], Iterator[Tensors]]


class Logistic:
    """Mean logistic loss of a matrix of weights and a vector of biases, plus a quadratic; gradients by hand."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
        self.y = torch.randint(2, (40, 3), generator=generator).double()
        self.start = [
            torch.randn(3, 5, dtype=torch.float64, generator=generator),
            torch.randn(3, dtype=torch.float64, generator=generator),
        ]

    def gradients(self, theta: Tensors) -> Tensors:
        weight, bias = theta
        error = torch.sigmoid(self.x @ weight.T + bias) - self.y
        return [error.T @ self.x / len(self.x) + 0.3 * weight, error.mean(0) + 0.1 * bias]

    def loss(self, theta: Tensors) -> torch.Tensor:
        weight, bias = theta
        logits = self.x @ weight.T + bias
        nats = torch.nn.functional.binary_cross_entropy_with_logits(logits, self.y, reduction="sum") / len(self.x)
        return nats + 0.15 * weight.square().sum() + 0.05 * bias.square().sum()


def descent(theta: Tensors, gradients: Callable[[Tensors], Tensors], at: dict[str, Any]) -> Iterator[Tensors]:
    for _ in range(STEPS):
        theta = [t - at["learning_rate"] * g for t, g in zip(theta, gradients(theta), strict=True)]
        yield theta


def momentum(theta: Tensors, gradients: Callable[[Tensors], Tensors], at: dict[str, Any]) -> Iterator[Tensors]:
    m, a = at.get("momentum", 0.9), at["learning_rate"]
    v = [torch.zeros_like(t) for t in theta]
    for _ in range(STEPS):
        g = gradients(theta)
        v = [m * old + new for old, new in zip(v, g, strict=True)]
        ahead = [new + m * old for old, new in zip(v, g, strict=True)] if at.get("nesterov") else v
        theta = [t - a * step for t, step in zip(theta, ahead, strict=True)]
        yield theta


def adam(theta: Tensors, gradients: Callable[[Tensors], Tensors], at: dict[str, Any]) -> Iterator[Tensors]:
    (b1, b2), e, a = at.get("betas", (0.9, 0.999)), at.get("epsilon", 1e-8), at["learning_rate"]
    decay = at.get("decay", 0.0)
    m, v = ([torch.zeros_like(t) for t in theta] for _ in range(2))
    for t in range(1, STEPS + 1):
        g = gradients(theta)
        m = [b1 * old + (1 - b1) * new for old, new in zip(m, g, strict=True)]
        v = [b2 * old + (1 - b2) * new**2 for old, new in zip(v, g, strict=True)]
        steps = [(p / (1 - b1**t)) / ((q / (1 - b2**t)).sqrt() + e) for p, q in zip(m, v, strict=True)]
        shrink = [1 - a * decay if old.ndim > 1 else 1.0 for old in theta]  # matrices only
        theta = [old * by - a * step for old, by, step in zip(theta, shrink, steps, strict=True)]
        yield theta


def adamw(theta: Tensors, gradients: Callable[[Tensors], Tensors], at: dict[str, Any]) -> Iterator[Tensors]:
    yield from adam(theta, gradients, {**at, "decay": at.get("weight_decay", 0.01)})


CASES: list[tuple[str, Formula, dict[str, Any]]] = [
    ("gd", descent, {"learning_rate": 0.3}),
    ("sgd", descent, {"learning_rate": 0.2}),
    ("momentum", momentum, {"learning_rate": 0.1}),
    ("momentum", momentum, {"learning_rate": 0.1, "momentum": 0.5}),
    ("momentum", momentum, {"learning_rate": 0.05, "momentum": 0.8, "nesterov": True}),
    ("adam", adam, {"learning_rate": 0.05}),
    ("adam", adam, {"learning_rate": 0.05, "betas": (0.7, 0.9), "epsilon": 1e-3}),
    ("adamw", adamw, {"learning_rate": 0.05}),
    ("adamw", adamw, {"learning_rate": 0.05, "weight_decay": 0.4, "betas": (0.8, 0.95), "epsilon": 1e-6}),
]


@pytest.mark.parametrize(("name", "formula", "settings"), CASES)
def test_every_step_is_the_formulas(name: str, formula: Formula, settings: dict[str, Any]) -> None:
    problem = Logistic(seed=len(name))
    theta = [start.clone().requires_grad_(True) for start in problem.start]
    optimizer = optimizers.build(theta, OptimizerConfig(name=name, **settings))
    first = float(problem.loss(theta).detach())
    for expected in formula([start.clone() for start in problem.start], problem.gradients, settings):
        optimizer.zero_grad()
        problem.loss(theta).backward()
        optimizer.step()
        for ours, theirs in zip(theta, expected, strict=True):
            # Error: float64 rounding over ten steps.
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-11, atol=1e-12)
    assert float(problem.loss(theta).detach()) < first


def test_decay_shrinks_matrices_only() -> None:
    theta = [torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)]
    for parameter in theta:
        parameter.grad = torch.zeros_like(parameter)
    optimizers.build(theta, OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(theta[0].detach(), torch.full((2, 2), 0.95))
    assert torch.equal(theta[1].detach(), torch.ones(2))


def test_gradient_descent_calls_its_closure_with_gradients_on() -> None:
    theta = torch.tensor([2.0], requires_grad=True)
    optimizer = optimizers.build([theta], OptimizerConfig(name="gd", learning_rate=0.25))

    def closure() -> float:
        loss = theta.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert float(theta.detach()) == 1.0


def test_gd_sees_all_rows() -> None:
    config = TrainConfig(
        model="m", output="o", data=DataConfig(train="t"), optimizer=OptimizerConfig(name="gd"), batch_size=8
    )
    with pytest.raises(ConfigError, match="batch_size = 0"):
        check(config)
    check(msgspec.structs.replace(config, batch_size=0))
    check(msgspec.structs.replace(config, optimizer=OptimizerConfig(name="sgd")))


SETTINGS: dict[str, Any] = {
    "momentum": 0.5,
    "nesterov": True,
    "betas": (0.9, 0.99),
    "epsilon": 1e-6,
    "weight_decay": 0.1,
}


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_an_optimizer_does_not_have_is_refused_by_name(name: str, setting: str) -> None:
    config = OptimizerConfig(name=name, **{setting: SETTINGS[setting]})
    theta = [torch.zeros(2, 2, requires_grad=True)]
    if setting in optimizers.OPTIMIZERS[name][1]:
        optimizers.build(theta, config)
    else:
        with pytest.raises(ConfigError, match=rf"optimizer\.{setting} means nothing to {name}"):
            optimizers.build(theta, config)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "lion"}, "'lion' is not known; known: gd, sgd"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"name": "momentum", "momentum": -0.1}, "momentum"),
        ({"name": "momentum", "momentum": 0.0, "nesterov": True}, "nesterov"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (math.nan, 0.9)}, "betas"),
        ({"epsilon": -1e-8}, "epsilon"),
        ({"weight_decay": math.nan}, "weight_decay"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        optimizers.build([torch.zeros(2, 2)], OptimizerConfig(**settings))
