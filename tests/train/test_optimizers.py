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
from steelyard.train.optimizers.groups import GroupConfig, depths, is_hidden_matrix
from steelyard.train.optimizers.muon import orthogonalize

STEPS = 10
Tensors = list[torch.Tensor]
# Yields theta after each step, given the start, the gradient's function and the settings.
Formula = Callable[[Tensors, Callable[[Tensors], Tensors], dict[str, Any]], Iterator[Tensors]]


def build(theta: Tensors, config: OptimizerConfig) -> torch.optim.Optimizer:
    return optimizers.build({f"layers.{number}.weight": tensor for number, tensor in enumerate(theta)}, config)


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


def adafactor(theta: Tensors, gradients: Callable[[Tensors], Tensors], at: dict[str, Any]) -> Iterator[Tensors]:
    """Shazeer and Stern 2018, algorithm 4, with the rate bounded by a / sqrt(t)-free relative steps as torch has it."""
    a, decay = at["learning_rate"], at.get("weight_decay", 0.0)
    rows: dict[int, torch.Tensor] = {}
    columns: dict[int, torch.Tensor] = {}
    whole: dict[int, torch.Tensor] = {}
    tiny = torch.finfo(torch.float64).eps
    for t in range(1, STEPS + 1):
        b = 1 - t**-0.8
        new = []
        for number, (old, g) in enumerate(zip(theta, gradients(theta), strict=True)):
            rate = min(a, 1 / math.sqrt(t)) * max(1e-3, float(old.square().mean().sqrt()))
            if old.ndim > 1:
                r = b * rows.get(number, torch.zeros(len(old))) + (1 - b) * g.square().mean(1)
                c = b * columns.get(number, torch.zeros(old.shape[1])) + (1 - b) * g.square().mean(0)
                rows[number], columns[number] = r, c
                size = (torch.outer(r, c) / r.mean()).clamp(min=tiny**2).sqrt()
            else:
                whole[number] = b * whole.get(number, torch.zeros_like(old)) + (1 - b) * g.square()
                size = whole[number].clamp(min=tiny**2).sqrt()
            step = g / size
            step = step / max(1.0, float(step.square().mean().sqrt()))
            new.append(old * (1 - a * (decay if old.ndim > 1 else 0.0)) - rate * step)
        theta = new
        yield theta


def lion(theta: Tensors, gradients: Callable[[Tensors], Tensors], at: dict[str, Any]) -> Iterator[Tensors]:
    (b1, b2), a, decay = at.get("betas", (0.9, 0.99)), at["learning_rate"], at.get("weight_decay", 0.0)
    m = [torch.zeros_like(t) for t in theta]
    for _ in range(STEPS):
        g = gradients(theta)
        signs = [torch.sign(b1 * old + (1 - b1) * new) for old, new in zip(m, g, strict=True)]
        shrink = [decay if old.ndim > 1 else 0.0 for old in theta]
        theta = [old - a * (sign + by * old) for old, sign, by in zip(theta, signs, shrink, strict=True)]
        m = [b2 * old + (1 - b2) * new for old, new in zip(m, g, strict=True)]
        yield theta


def muon(theta: Tensors, gradients: Callable[[Tensors], Tensors], at: dict[str, Any]) -> Iterator[Tensors]:
    """The matrix by the polynomial of its singular values, the vector by AdamW."""
    m, a, decay = at.get("momentum", 0.95), at["learning_rate"], at.get("weight_decay", 0.01)
    (b1, b2), e = at.get("betas", (0.9, 0.999)), at.get("epsilon", 1e-8)
    v, mean, square = torch.zeros_like(theta[0]), torch.zeros_like(theta[1]), torch.zeros_like(theta[1])
    for t in range(1, STEPS + 1):
        g, bias = gradients(theta)
        v = m * v + g
        left, values, right = torch.linalg.svd(g + m * v, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        step = 0.2 * math.sqrt(max(g.shape)) * (left @ torch.diag(values) @ right)
        mean, square = b1 * mean + (1 - b1) * bias, b2 * square + (1 - b2) * bias**2
        moved = (mean / (1 - b1**t)) / ((square / (1 - b2**t)).sqrt() + e)
        theta = [(1 - a * decay) * theta[0] - a * step, theta[1] - a * moved]
        yield theta


def schedule_free(theta: Tensors, gradients: Callable[[Tensors], Tensors], at: dict[str, Any]) -> Iterator[Tensors]:
    (b1, b2), e, a = at.get("betas", (0.9, 0.999)), at.get("epsilon", 1e-8), at["learning_rate"]
    decay = at.get("weight_decay", 0.0)
    z, x, y = ([t.clone() for t in theta] for _ in range(3))
    v = [torch.zeros_like(t) for t in theta]
    for t in range(1, STEPS + 1):
        g = gradients(y)
        v = [b2 * old + (1 - b2) * new**2 for old, new in zip(v, g, strict=True)]
        for number, gradient in enumerate(g):
            shrink = decay if z[number].ndim > 1 else 0.0
            size = (v[number] / (1 - b2**t)).sqrt() + e
            z[number] = z[number] - a * gradient / size - a * shrink * y[number]
            x[number] = (1 - 1 / t) * x[number] + z[number] / t
            y[number] = (1 - b1) * z[number] + b1 * x[number]
        yield y


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
    ("adafactor", adafactor, {"learning_rate": 0.05}),
    ("adafactor", adafactor, {"learning_rate": 0.05, "weight_decay": 0.2}),
    ("lion", lion, {"learning_rate": 0.02}),
    ("lion", lion, {"learning_rate": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.3}),
    ("muon", muon, {"learning_rate": 0.05}),
    ("muon", muon, {"learning_rate": 0.05, "momentum": 0.8, "weight_decay": 0.3, "betas": (0.7, 0.9)}),
    ("schedule-free", schedule_free, {"learning_rate": 0.05}),
    ("schedule-free", schedule_free, {"learning_rate": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.2}),
]


@pytest.mark.parametrize(("name", "formula", "settings"), CASES)
def test_every_step_is_the_formulas(name: str, formula: Formula, settings: dict[str, Any]) -> None:
    problem = Logistic(seed=len(name))
    theta = [start.clone().requires_grad_(True) for start in problem.start]
    optimizer = build(theta, OptimizerConfig(name=name, **settings))
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
    build(theta, OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(theta[0].detach(), torch.full((2, 2), 0.95))
    assert torch.equal(theta[1].detach(), torch.ones(2))


def test_gradient_descent_calls_its_closure_with_gradients_on() -> None:
    theta = torch.tensor([2.0], requires_grad=True)
    optimizer = build([theta], OptimizerConfig(name="gd", learning_rate=0.25))

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
    if setting in optimizers.OPTIMIZERS[name].settings:
        build(theta, config)
    else:
        with pytest.raises(ConfigError, match=rf"optimizer\.{setting} means nothing to {name}"):
            build(theta, config)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "adagrad"}, "'adagrad' is not known; known: gd, sgd"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"name": "momentum", "momentum": -0.1}, "momentum"),
        ({"name": "momentum", "momentum": 0.0, "nesterov": True}, "nesterov"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (math.nan, 0.9)}, "betas"),
        ({"epsilon": -1e-8}, "epsilon"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"layer_decay": 1.1}, "layer_decay"),
        ({"unfreeze_epochs": -1.0}, "unfreeze_epochs"),
        ({"groups": (GroupConfig(match="("),)}, r"groups\[0\]\.match"),
        ({"groups": (GroupConfig(match="a", scale=-1.0),)}, r"groups\[0\]\.scale"),
        ({"name": "sgd", "groups": (GroupConfig(match="a", weight_decay=0.1),)}, r"groups\[0\]\.weight_decay"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build([torch.zeros(2, 2)], OptimizerConfig(**settings))


def test_muon_is_torchs_on_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 5), (5, 8), (16, 16))]
    ours, theirs = ([tensor.clone().requires_grad_(True) for tensor in start] for _ in range(2))
    settings = {"learning_rate": 0.03, "momentum": 0.9, "weight_decay": 0.1}
    built = build(ours, OptimizerConfig(name="muon", **settings))
    reference = torch.optim.Muon(theirs, lr=0.03, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for pair in zip(ours, theirs, strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for tensor in pair:
                tensor.grad = gradient.clone()
        built.step()
        reference.step()
    for mine, expected in zip(ours, theirs, strict=True):
        # Torch keeps the momentum as an average where ours is a sum: the direction is the same but for bfloat16.
        torch.testing.assert_close(mine, expected, atol=5e-3, rtol=0)


def test_what_is_orthogonalised_has_singular_values_near_one() -> None:
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


NAMES = ("model.embed_tokens.weight", "model.layers.0.q.weight", "model.layers.1.q.weight", "lm_head.weight", "norm.w")


def test_groups_by_depth_kind_and_name() -> None:
    tensors = {name: torch.zeros(2, 2) if "norm" not in name else torch.zeros(2) for name in NAMES}
    assert [depths(tensors)[name] for name in NAMES] == [3, 2, 1, 0, 0]
    assert [is_hidden_matrix(name, tensors[name]) for name in NAMES] == [False, True, True, False, False]
    config = OptimizerConfig(
        layer_decay=0.5,
        unfreeze_epochs=2.0,
        weight_decay=0.1,
        groups=(GroupConfig(match="embed", scale=0.0), GroupConfig(match=r"layers\.1", weight_decay=0.7)),
    )
    found = {}
    for group in optimizers.build(tensors, config).param_groups:
        for tensor in group["params"]:
            name = next(name for name in NAMES if tensors[name] is tensor)
            found[name] = group["scale"], group["weight_decay"], group["start"]
    assert found == {
        "model.embed_tokens.weight": (0.0, 0.1, 6.0),
        "model.layers.0.q.weight": (0.25, 0.1, 4.0),
        "model.layers.1.q.weight": (0.5, 0.7, 2.0),
        "lm_head.weight": (1.0, 0.1, 0.0),
        "norm.w": (1.0, 0.0, 0.0),
    }
