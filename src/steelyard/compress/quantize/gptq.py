"""GPTQ (Frantar et al. 2022, algorithm 1): weights are rounded column by column, and those to the right make good what
rounding changed, by the inputs that the layer has seen.
"""

# N outputs  M inputs  G groups of inputs

from __future__ import annotations

import torch

from steelyard.compress.quantize import grid
from steelyard.compress.quantize.grid import Integers
from steelyard.compress.second_order import DAMPING, inverse_factor

BLOCK = 128
"""Columns, at the least, after which those to their right are made good."""


def rounded(
    weight: torch.Tensor, gram: torch.Tensor, bits: int, group: int | None, *, damping: float = DAMPING
) -> Integers:
    """Round a layer's weights.

    Args:
        weight: `[N, M]`.
        gram: `[M, M]`, sum of x x^T over the layer's inputs x; float32 or more.
        bits: 8 or 4.
        group: inputs that share a scale, which is found when its turn comes; None: all.
        damping: see `DAMPING`.
    """
    left, inverse = weight.to(gram.dtype, copy=True), inverse_factor(gram, damping)
    importance = gram.diagonal()
    outputs, inputs = weight.shape
    width = group or inputs
    values = torch.empty(outputs, inputs, dtype=torch.int8)
    scale = torch.empty(outputs, inputs // width, dtype=torch.bfloat16)
    if group is None:
        scale[:] = grid.scales(left, bits, None, importance)
    step = -(-BLOCK // width) * width if group else BLOCK
    for begin in range(0, inputs, step):
        columns = slice(begin, begin + step)
        part, factor = left[:, columns], inverse[columns, columns]
        errors = torch.zeros_like(part)
        for place in range(part.shape[1]):
            number = (begin + place) // width
            if group is not None and place % width == 0:
                few = slice(place, place + width)
                scale[:, number : number + 1] = grid.scales(
                    part[:, few], bits, None, importance[begin + place : begin + place + width]
                )
            column = part[:, place].clone()
            values[:, begin + place] = whole = grid.to_grid(column[:, None], scale[:, number : number + 1], bits)[:, 0]
            errors[:, place] = (column - whole.to(gram.dtype) * scale[:, number].to(gram.dtype)) / factor[place, place]
            part[:, place:] -= errors[:, place, None] * factor[place, place:]
        left[:, columns.stop :] -= errors @ inverse[columns, columns.stop :]
    return Integers(values, scale)
