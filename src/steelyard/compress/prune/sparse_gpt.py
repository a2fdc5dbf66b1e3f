"""SparseGPT (Frantar and Alistarh 2023, algorithm 1): weights go column by column, and those to the right make good
what each took away, by the inputs that the layer has seen.
"""

# N outputs  M inputs

from __future__ import annotations

import torch

from steelyard.compress.prune import masks
from steelyard.compress.prune.masks import Pattern
from steelyard.compress.second_order import DAMPING, inverse_factor

BLOCK = 128
"""Columns whose mask is chosen together, after what went to their left was made good."""


def prune(
    weight: torch.Tensor,
    gram: torch.Tensor,
    rate: float,
    pattern: Pattern | None = None,
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> torch.Tensor:
    """A layer's weights with a share of them 0.

    Args:
        weight: `[N, M]`.
        gram: `[M, M]`, sum of x x^T over the layer's inputs x; float32 or more.
        rate: share of every block of columns that goes.
        pattern: of every few weights so many stay, instead.
        damping: see `DAMPING`.
        block: see `BLOCK`; a multiple of the pattern's length.

    Returns:
        `[N, M]` in the dtype of `gram`.
    """
    left, inverse = weight.to(gram.dtype, copy=True), inverse_factor(gram, damping)
    left[:, gram.diagonal() == 0] = 0  # inputs that are always 0 need no weights
    width = pattern.of if pattern else 1
    for begin in range(0, left.shape[1], block):
        columns = slice(begin, begin + block)
        part, factor = left[:, columns], inverse[columns, columns]
        deviations = factor.diagonal()
        errors = torch.zeros_like(part)
        going = masks.lowest_of_layer((part / deviations).square(), rate) if pattern is None else None
        for place in range(part.shape[1]):
            if pattern is not None and place % width == 0:
                few = slice(place, place + width)
                chosen = masks.lowest_of_few((part[:, few] / deviations[few]).square(), pattern)
            here = going[:, place] if going is not None else chosen[:, place % width]
            gone = torch.where(here, part[:, place], 0)
            errors[:, place] = gone / deviations[place]
            part[:, place:] -= errors[:, place, None] * factor[place, place:]  # its own place becomes 0 so, rounded
            part[:, place].masked_fill_(here, 0)
        left[:, columns.stop :] -= errors @ inverse[columns, columns.stop :]
    return left
