"""A learning rate for a run, found by raising it at every step and watching the loss (Smith 2017, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from steelyard.errors import TrainingError
from steelyard.train.trainer import Diverged, Trainer

FIRST, LAST = 1e-7, 1.0
WORSE = 4.0
"""Times the best loss so far, at which it is too high."""
SMOOTHING = 0.9
"""Share of the mean so far in the loss that is looked at."""
WINDOW = 16
"""Part of the trial over which a slope is taken, to each side."""
SAFETY = 10.0
"""How much lower than where the loss is least a rate should be, at most."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the trial showed."""

    rates: list[float]
    losses: list[float]
    """Of each rate, smoothed."""
    suggestion: float


def find(trainer: Trainer, steps: int, report: Callable[[int, int], None] = lambda done, of: None) -> Found:
    """Train for some steps, each with a higher rate than the one before, until the loss is far above its best.

    All steps see the same rows, so that nothing but the rate moves the loss; other rows would hide a small run's slope
    in their noise. The trainer's weights are of no use afterwards.

    Args:
        trainer: of a run that has not begun.
        steps: at most; the rate rises from 1e-7 to 1 over them.
        report: told (steps done, of how many).

    Raises:
        TrainingError: the loss is not finite from the start, or falls at no rate.
    """
    trainer.task.train(True)
    rates: list[float] = []
    losses: list[float] = []
    mean, best, batch = 0.0, math.inf, trainer.loader.next()
    for step in range(steps):
        rate = FIRST * (LAST / FIRST) ** (step / max(1, steps - 1))
        try:
            loss = trainer.gradient(batch)
            trainer.clip()
        except Diverged as error:
            if not losses:
                raise TrainingError(f"{error} before anything was learnt: look at the data") from None
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth = mean / (1 - SMOOTHING ** (step + 1))
        rates.append(rate)
        losses.append(smooth)
        best = min(best, smooth)
        if smooth > WORSE * best:
            break
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        trainer.optimizer.step()
        trainer.publish()
        report(step + 1, steps)
    return Found(rates=rates, losses=losses, suggestion=suggest(rates, losses))


def suggest(rates: list[float], losses: list[float]) -> float:
    """The rate at which the loss falls fastest, but a tenth of the rate of the least loss if that is lower.

    Raises:
        TrainingError: it falls nowhere.
    """
    least = min(range(len(losses)), key=losses.__getitem__)
    wide = max(1, len(losses) // WINDOW)  # noise is not a slope
    falls = {
        place: (losses[place + wide] - losses[place - wide]) / math.log(rates[place + wide] / rates[place - wide])
        for place in range(wide, min(least + 1, len(losses) - wide))
    }
    if not falls or min(falls.values()) >= 0:
        raise TrainingError("the loss fell at no learning rate: look at the data, or try more steps")
    steepest = rates[min(falls, key=falls.__getitem__)]
    return float(f"{min(steepest, rates[least] / SAFETY):.1g}")
