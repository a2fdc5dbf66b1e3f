"""Memory that is estimated before a run takes it: against what autograd keeps, and what is advised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steelyard.errors import ConfigError
from steelyard.kernels.recompute import kept_bytes
from steelyard.train import demand
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.demand import Demand
from steelyard.train.optimizers import OptimizerConfig


class Rows:
    """A task of one product for each row."""

    padded = False

    def __init__(self, sizes: list[int]) -> None:
        self.rows, self._sizes = len(sizes), sizes
        self.parameters = {"weight": torch.randn(100, 50)}

    def size(self, row: int) -> int:
        return self._sizes[row]

    def loss(self, rows: Any) -> torch.Tensor:
        x = torch.rand(sum(self._sizes[row] for row in rows), 100)
        return (x @ self.parameters["weight"]).exp().sum()


def configuration(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"output": "x", "data": DataConfig(train="y"), "model": "z", **fields})


def test_what_is_kept_is_counted_once() -> None:
    weight = torch.randn(20, 10, requires_grad=True)
    x = torch.randn(8, 20)

    def forward() -> torch.Tensor:
        inner = (x @ weight).exp()
        return (inner * inner).sum()

    assert kept_bytes(forward, [weight]) == 4 * (8 * 20 + 8 * 10), "x, and what exp and the product share"


def test_a_run_is_the_optimizers_state_and_its_largest_pass() -> None:
    task = Rows([3, 9, 6, 2])
    state = torch.get_rng_state()
    found = demand.measure(task, configuration(batch_size=2, optimizer=OptimizerConfig(name="adamw")))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert found.state == 5000 * 16
    assert found.units == 15, "the two largest together"
    assert (found.fixed, found.each) == (0, 4 * (100 + 50))
    assert not task.parameters["weight"].requires_grad
    for name, bytes in (("sgd", 8), ("momentum", 12), ("lion", 12), ("schedule-free", 20), ("adafactor", 8)):
        config = configuration(micro_batch_tokens=4, optimizer=OptimizerConfig(name=name))
        assert demand.measure(task, config).state == 5000 * bytes  # type: ignore[arg-type]
        assert demand.measure(task, config).units == 9, "a row is not cut"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("free", "complaint"),
    [
        (
            5_000,
            r"12.0 GB more \(4.0 for the optimizer, 8.0 for a pass of 8000\), and 5.0 GB.*micro_batch_tokens to 960,",
        ),
        (3_000, "or take optimizer adafactor"),
        (3_000, 'learn an adapter .method = "lora".'),
    ],
)
def test_what_does_not_fit_says_what_to_change(free: int, complaint: str) -> None:
    wanted = Demand(state=4_000_000_000, fixed=0.0, each=1e6 / demand.PASSING, units=8000)
    with pytest.raises(ConfigError, match=complaint):
        demand.demand_room(wanted, free * 1_000_000, configuration(method="full"))


def test_what_fits_goes_on() -> None:
    wanted = Demand(state=4_000, fixed=0.0, each=1.0, units=8)
    demand.demand_room(wanted, None, configuration())
    demand.demand_room(wanted, 5_000, configuration())


def test_the_estimate_of_a_decoder_holds_for_other_rows(tiny_model: Path) -> None:
    """What short rows keep tells what long ones do; what any pass keeps (here the head's gradient) is apart."""
    from steelyard.data.rows import TokenRow
    from steelyard.data.token_rows import TokenRows
    from steelyard.models import weights
    from steelyard.train.language_model import LanguageModelling

    sizes = [6, 7, 8, 9, 200]
    rows = [TokenRow(tokens=list(range(3, 3 + size)), trained=[False] + [True] * (size - 1)) for size in sizes]
    task = LanguageModelling(weights.load(tiny_model), None, TokenRows.of(rows), tiny_model)
    found = demand.measure(task, configuration(batch_size=1))
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    truth = kept_bytes(lambda: task.loss([4]), list(task.parameters.values()))
    assert found.units == 200
    assert found.fixed > 10_000
    assert found.passing(200) / demand.PASSING == pytest.approx(truth, rel=0.3)


def test_a_frozen_base_is_there_anyway(tiny_model: Path) -> None:
    from steelyard.data.rows import TokenRow
    from steelyard.data.token_rows import TokenRows
    from steelyard.models import weights
    from steelyard.train import lora
    from steelyard.train.language_model import LanguageModelling
    from steelyard.train.lora import LoraConfig

    decoder = weights.load(tiny_model)
    size = sum(parameter.numel() * parameter.element_size() for parameter in decoder.model.layers.parameters())
    rows = [TokenRow(tokens=list(range(3, 3 + length)), trained=[False, *[True] * (length - 1)]) for length in (5, 6)]
    adapter = lora.start(decoder, LoraConfig(rank=2), 0)
    found = demand.measure(LanguageModelling(decoder, adapter, TokenRows.of(rows), tiny_model), configuration())
    assert found.fixed < size / 2, "its weights do not count"
