"""How the learning rate goes over a run: a warm-up, then constant, linear or cosine. Knows steps, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from steelyard.errors import ConfigError


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The learning rate as a share of its peak."""

    name: str = "cosine"
    """constant, linear or cosine."""
    warmup: float = 0.06
    """Share of all steps over which the rate rises from 0 to its peak; 1 or more is a number of steps."""
    floor: float = 0.0
    """Share of the peak at the end of linear and cosine."""


# share of the way after the warm-up -> share of the peak, before the floor
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),  # Loshchilov and Hutter 2017, equation 5
}


def check(config: ScheduleConfig) -> None:
    """Raise ConfigError for what `factor` cannot compute."""
    if config.name not in SHAPES:
        raise ConfigError(f"schedule.name '{config.name}' is not known; known: {', '.join(SHAPES)}")
    if not 0 <= config.warmup < math.inf or not 0 <= config.floor <= 1:
        raise ConfigError("schedule.warmup must be at least 0, schedule.floor between 0 and 1")


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0) of `steps`."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
    if step < warmup:
        return (step + 1) / (math.ceil(warmup) + 1)
    share = (step - warmup) / max(1.0, steps - warmup)
    return config.floor + (1 - config.floor) * SHAPES[config.name](min(share, 1.0))
