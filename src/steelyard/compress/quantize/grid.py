"""Rounding of weights to integers with a scale per output channel, or per group of its inputs."""

# N outputs  M inputs  G groups of inputs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

LARGEST = {8: 127, 4: 7}
"""By bits: what the largest magnitude of a group is rounded to, at the least. Four bits go to -8."""
LOWEST = {8: -127, 4: -8}
SHRINK = tuple(1 - step / 32 for step in range(14))
"""Four bits: by what a scale may be multiplied, so that a few large weights are cut and all others are nearer."""


class Integers(NamedTuple):
    """A weight, rounded."""

    values: torch.Tensor
    """`[N, M]` int8."""
    scale: torch.Tensor
    """`[N, G]` bfloat16."""

    def restored(self) -> torch.Tensor:
        """`[N, M]` float32."""
        outputs, groups = self.scale.shape
        return (self.values.float().view(outputs, groups, -1) * self.scale.float()[..., None]).flatten(1)


def rounded(
    weight: torch.Tensor,
    bits: int,
    group: int | None,
    importance: torch.Tensor | None = None,
    factors: Sequence[float] = SHRINK,
) -> Integers:
    """Round each weight to the nearest integer times its group's scale.

    Args:
        weight: `[N, M]`.
        bits: 8 or 4.
        group: inputs that share a scale; None: all.
        importance: `[M]`, what an error in each column counts; all the same if None.
        factors: see `scales`.
    """
    scale = scales(weight, bits, group, importance, factors)
    return Integers(to_grid(weight, scale, bits), scale)


def scales(
    weight: torch.Tensor,
    bits: int,
    group: int | None,
    importance: torch.Tensor | None = None,
    factors: Sequence[float] = SHRINK,
) -> torch.Tensor:
    """`[N, G]` bfloat16; see `rounded`.

    8 bits: by the largest magnitude. 4 bits: of `factors` times that, the one that leaves the least sum of squared
    errors. A scale is rounded first, so that the stored pair is what was rounded to.
    """
    outputs, inputs = weight.shape
    wide = weight.float().reshape(outputs, -1, group or inputs)
    # The smallest normal bfloat16 for groups of zeros: any scale does, and readers divide by it.
    whole = wide.abs().amax(-1) / LARGEST[bits]
    best = stored(whole)
    if bits == 8:
        return best
    counts = 1.0 if importance is None else importance.float().view(1, wide.shape[1], -1)
    least: torch.Tensor | None = None
    for factor in factors:
        scale = stored(whole * factor)
        error = ((_nearest(wide, scale, bits) * scale.float()[..., None] - wide).square() * counts).sum(-1)
        if least is None:
            least = error
            continue
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def stored(scale: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored: bfloat16, none of them 0."""
    return scale.to(torch.bfloat16).clamp_min(torch.finfo(torch.bfloat16).tiny)


def to_grid(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """`[N, M]` -> `[N, M]` int8 by scales `[N, G]`."""
    outputs, groups = scale.shape
    return _nearest(weight.float().reshape(outputs, groups, -1), scale, bits).flatten(1).to(torch.int8)


def _nearest(wide: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (wide / scale.float()[..., None]).round_().clamp_(LOWEST[bits], LARGEST[bits])
