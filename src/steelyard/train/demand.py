"""What memory a run will take, before it takes it: measured on its smallest rows, and counted for the rest."""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np
import torch

from steelyard.errors import ConfigError
from steelyard.kernels.recompute import kept_bytes
from steelyard.train.config import TrainConfig
from steelyard.train.task import Task

MOMENTS = {"gd": 0, "sgd": 0, "adafactor": 0, "momentum": 4, "lion": 4, "muon": 8, "adam": 8, "adamw": 8}
"""Bytes of state that an optimizer keeps for each parameter,"""
MOST = 12
"""and that schedule-free does."""
MASTERS, GRADIENTS = 4, 4
PASSING = 1.15
"""Of what is kept for the backward pass: what the passes themselves need for a while."""
SAMPLE = 4
"""Rows of the larger of two passes that are measured, to tell what each unit keeps from what any pass does."""
LEAST = 64


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, besides the network's own."""

    state: int
    """Masters, gradients, moments."""
    fixed: float
    """Of a forward pass, however large."""
    each: float
    """Of a unit of a forward pass (token, patch, fiftieth of a second), kept for the backward pass."""
    units: int
    """Of the largest forward pass."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.state + self.passing(self.units)

    def passing(self, units: int) -> int:
        """Of a forward pass of so many units."""
        return int(PASSING * (self.fixed + self.each * units))


def measure(task: Task, config: TrainConfig) -> Demand:
    """What a run of this task takes. The random generator stays as it is."""
    count = sum(parameter.numel() for parameter in task.parameters.values())
    moments = MOMENTS.get(config.optimizer.name, MOST)
    sizes = np.fromiter((task.size(row) for row in range(task.rows)), np.int64, task.rows)
    order = np.argsort(sizes, kind="stable")
    few, more = order[:1].tolist(), order[:SAMPLE].tolist()
    trained = [parameter.requires_grad for parameter in task.parameters.values()]
    state = torch.get_rng_state()
    try:
        for parameter in task.parameters.values():
            parameter.requires_grad_(True)
        kept = [kept_bytes(partial(task.loss, rows), list(task.parameters.values())) for rows in (few, more)]
    finally:
        torch.set_rng_state(state)
        for parameter, flag in zip(task.parameters.values(), trained, strict=True):
            parameter.requires_grad_(flag)
    units = [_units(task, sizes[rows].tolist()) for rows in (few, more)]
    each = (kept[1] - kept[0]) / (units[1] - units[0]) if units[1] > units[0] else kept[0] / max(1, units[0])
    batch = int(sizes[order[-(config.batch_size or task.rows) :]].sum())
    return Demand(
        state=count * (MASTERS + GRADIENTS + moments + (4 if config.ema else 0)),
        fixed=max(0.0, kept[0] - each * units[0]),
        each=max(0.0, each),
        units=max(int(sizes.max()), min(batch, config.micro_batch_tokens)),
    )


def _units(task: Task, sizes: list[int]) -> int:
    """Of a forward pass over rows of these sizes."""
    return len(sizes) * max(sizes) if task.padded else sum(sizes)


def demand_room(demand: Demand, free: int | None, config: TrainConfig) -> None:
    """Refuse a run that the machine cannot hold.

    Raises:
        ConfigError: how much is wanted, how much there is, and what to change.
    """
    if free is None or demand.bytes <= free:
        return
    advice = []
    room = free - demand.state
    fitting = int((room / PASSING - demand.fixed) / demand.each) if demand.each else demand.units
    if room > 0 and LEAST <= fitting < demand.units:
        advice.append(f"set micro_batch_tokens to {fitting // LEAST * LEAST}")
    if config.method == "full" and config.model is not None:
        advice.append('learn an adapter (method = "lora")')
    if MOMENTS.get(config.optimizer.name, MOST) >= 8:
        advice.append("take optimizer adafactor, which keeps next to nothing, or lion, which keeps half")
    advice.append("lower data.max_length, or take a smaller network")
    raise ConfigError(
        f"the run would take about {demand.bytes / 1e9:.1f} GB more ({demand.state / 1e9:.1f} for the optimizer,"
        f" {demand.passing(demand.units) / 1e9:.1f} for a pass of {demand.units}), and {free / 1e9:.1f} GB are free: "
        + ", or ".join(advice)
    )
