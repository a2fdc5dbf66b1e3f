"""How far shares can be believed: what happens to a probability when units go, or come, in their order.

Deletion and insertion (Petsiuk et al. 2018): the area under the probability as units go, the likeliest cause first
(lower is better), or come (higher is better). Comprehensiveness and sufficiency (DeYoung et al. 2020): what is lost
without the first units, and with them alone. Beside each the same for orders drawn at random: without that a figure
says nothing.
"""

# O orders  G places of the grid  U units

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from steelyard.explain.methods import SEED, likelihoods
from steelyard.explain.subject import Steps, Subject
from steelyard.infer.effort import DRAWN, GRID
from steelyard.infer.request import Faithfulness

FIRST = slice(1, 5)
"""Of the grid, what comprehensiveness and sufficiency are means over."""


def measure(
    subject: Subject, shares: torch.Tensor, *, grid: Sequence[float] = GRID, drawn: int = DRAWN
) -> Steps[tuple[Faithfulness, Faithfulness]]:
    """Delete and insert units by their shares `[U]`, and by chance: the mean of `drawn` random orders."""
    generator = torch.Generator().manual_seed(SEED + 1)
    orders = [torch.argsort(-shares, stable=True)]
    orders += [torch.randperm(subject.units, generator=generator) for _ in range(drawn)]
    counts = [math.ceil(share * subject.units) for share in grid]
    first = torch.stack([_first(order, counts) for order in orders])  # [O, G, U]
    rows = torch.cat([~first, first]).flatten(0, 1)
    found = yield from likelihoods(subject, rows)
    going, coming = found.exp().view(2, len(orders), len(grid))
    each = [_figures(one, other, grid) for one, other in zip(going.tolist(), coming.tolist(), strict=True)]
    return each[0], _mean(each[1:] or each)


def _first(order: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """`[G, U]` bool: the first so many of an order."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return rank[None, :] < torch.tensor(counts)[:, None]


def _figures(going: list[float], coming: list[float], grid: Sequence[float]) -> Faithfulness:
    whole = going[0]
    without, alone = going[FIRST], coming[FIRST]
    return Faithfulness(
        _area(going, grid),
        _area(coming, grid),
        whole - sum(without) / len(without),
        whole - sum(alone) / len(alone),
    )


def _area(values: Sequence[float], grid: Sequence[float]) -> float:
    """By trapezoids."""
    pairs = zip(grid, grid[1:], values, values[1:], strict=False)
    return sum((right - left) * (one + other) / 2 for left, right, one, other in pairs)


def _mean(figures: Sequence[Faithfulness]) -> Faithfulness:
    parts = [(one.deletion, one.insertion, one.comprehensiveness, one.sufficiency) for one in figures]
    return Faithfulness(*(sum(part) / len(parts) for part in zip(*parts, strict=True)))
