"""The weights that a model is, where they are not those that learn: an average of them, for evaluation and keeping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from steelyard.train.optimizers.schedule_free import ScheduleFree


class Averages:
    """An exponential average of the masters (Polyak and Juditsky 1992), or the optimizer's own average.

    Args:
        masters: the weights that learn, by name.
        optimizer: what changes them.
        decay: of the exponential average, which begins as a plain mean; 0: there is none.
    """

    def __init__(self, masters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.masters, self.optimizer, self.decay = masters, optimizer, decay
        self.values = {name: master.clone() for name, master in masters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the masters after a step, from 1."""
        share = max(1 - self.decay, 1 / (step + 1))
        for name, average in self.values.items():
            average.lerp_(self.masters[name], share)

    @contextlib.contextmanager
    def worn(self) -> Iterator[bool]:
        """Within the block the masters are the averages; afterwards they are what they were, to the bit.

        Yields:
            Whether anything is different.
        """
        averages = self._averages()
        kept = {name: self.masters[name].clone() for name in averages}
        with torch.no_grad():
            for name, average in averages.items():
                self.masters[name].copy_(average)
        try:
            yield bool(averages)
        finally:
            with torch.no_grad():
                for name, master in kept.items():
                    self.masters[name].copy_(master)

    def _averages(self) -> Mapping[str, torch.Tensor]:
        if self.values or not isinstance(self.optimizer, ScheduleFree):
            return self.values
        found = self.optimizer.averages()
        return {name: found[master] for name, master in self.masters.items() if master in found}
