"""Training that knows of rounding: the forward pass runs on what rounding leaves of the weights, and what it says of
that changes the whole ones (the straight-through estimator: Courbariaux et al. 2015, algorithm 1).
"""

# N outputs  M inputs

from __future__ import annotations

from collections.abc import Mapping

import torch

from steelyard.compress.quantize import grid
from steelyard.compress.quantize.grid import Integers


class Rounding:
    """Rounds a decoder's linear layers inside its blocks, with the scales that their weights had at first.

    Args:
        parameters: the decoder's, by name, before anything is learnt.
        bits: 8 or 4.
        group: inputs that share a scale; None: all.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], bits: int, group: int | None) -> None:
        self.bits = bits
        self.scales = {
            name: grid.scales(parameter.detach(), bits, group)
            for name, parameter in parameters.items()
            if name.startswith("model.layers.") and name.endswith("_proj.weight")
        }

    def __call__(self, name: str, master: torch.Tensor) -> torch.Tensor:
        """A parameter `[N, M]` float32 as it will be; others as they are."""
        scale = self.scales.get(name)
        return master if scale is None else Integers(grid.to_grid(master, scale, self.bits), scale).restored()
