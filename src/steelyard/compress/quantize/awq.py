"""AWQ (Lin et al. 2024, section 3.2): channels of which the activations have much are rounded finely, their weights
being multiplied before they are rounded. Each layer's strength is searched: the one that changes its outputs least.

Ours differs in two things: scales are powers of two, as in `smoothing.py`; and a layer's error is not sampled but taken
whole, from the sum of x x^T: of a change E of the weights it is the trace of E (sum of x x^T) E^T.
"""

# M inputs

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from steelyard.compress.inputs import Products
from steelyard.compress.quantize import grid
from steelyard.compress.quantize.smoothing import LEAST, powers

FACTORS = grid.SHRINK[::4]
"""Of scales, while strengths are tried."""
STRENGTHS = tuple(step / 10 for step in range(11))


class Seen(Products):
    """A layer's inputs, with their mean magnitudes."""

    def __init__(self, size: int) -> None:
        super().__init__(size, whole=True)
        self.sizes = torch.zeros(size)
        """`[M]`: sum of |x|."""
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """See `Record`."""
        super().add(x)
        self.sizes += x.detach().flatten(0, -2).float().abs().sum(0)
        self.rows += x.shape[:-1].numel()


class Awq:
    """AWQ's rule; see `Rule`.

    Args:
        bits: that weights will have.
        group: inputs that will share a scale; None: all.
    """

    def __init__(self, bits: int, group: int | None) -> None:
        self.bits, self.group = bits, group

    def record(self, layer: nn.Linear) -> Seen:
        """See `Rule`."""
        return Seen(layer.in_features)

    def scales(self, seen: Seen, layers: Sequence[nn.Linear]) -> torch.Tensor:
        """See `Rule`."""
        sizes = (seen.sizes / max(seen.rows, 1)).clamp_min(LEAST).log2()
        tried = [powers(strength * sizes) for strength in STRENGTHS]
        errors = [sum(self._error(layer.weight, found, seen) for layer in layers) for found in tried]
        return tried[errors.index(min(errors))]

    def _error(self, weight: torch.Tensor, found: torch.Tensor, seen: Seen) -> float:
        assert seen.gram is not None
        multiplied = weight.detach().float() * found
        importance = seen.squares / found.square()
        change = (grid.rounded(multiplied, self.bits, self.group, importance, FACTORS).restored() - multiplied) / found
        return float(((change @ seen.gram) * change).sum())
