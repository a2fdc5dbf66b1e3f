"""Ways to tell each unit's share in a value. A method is a function from a subject to shares; `METHODS` has all."""

# R rows  U units

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from steelyard.explain.subject import Steps, Subject
from steelyard.infer.effort import INTEGRAL
from steelyard.infer.request import Method

ROWS = 32
"""Rows that are asked of a subject at a time."""
SEED = 0x5EED


@dataclass(frozen=True)
class Shares:
    """What was found."""

    units: torch.Tensor
    """`[U]` float64, in nats of the value."""
    rest: float
    """Of what belongs to no unit."""
    value: float
    """Of the whole input."""
    base: float
    """Of nothing, where the method compares with it; else 0."""

    @property
    def residual(self) -> float:
        """What the shares do not account for: value - base - sum."""
        return self.value - self.base - float(self.units.sum()) - self.rest


def relevance(subject: Subject) -> Steps[Shares]:
    """Attention-aware layer-wise relevance propagation, see `rules.py`: one pass forward, one back."""
    taken = yield from subject.taken(rules=True)
    found = subject.spread(tuple(x * g for x, g in zip(taken.inputs, taken.gradients, strict=True)))
    return Shares(found[:-1], float(found[-1]), taken.value, 0.0)


def gradient_x_input(subject: Subject) -> Steps[Shares]:
    """Input times gradient (Shrikumar et al. 2016)."""
    taken = yield from subject.taken()
    found = subject.spread(tuple(x * g for x, g in zip(taken.inputs, taken.gradients, strict=True)))
    return Shares(found[:-1], float(found[-1]), taken.value, 0.0)


def integrated_gradients(subject: Subject) -> Steps[Shares]:
    """What was read times the mean gradient on its way from nothing (Sundararajan et al. 2017, equation 1).

    The midpoint of each of `INTEGRAL` parts.
    """
    whole = yield from subject.taken()
    nothing = yield from subject.taken(share=0.0)
    sums = tuple(torch.zeros_like(x) for x in whole.inputs)
    for part in range(INTEGRAL):
        taken = yield from subject.taken(share=(part + 0.5) / INTEGRAL)
        for total, gradient in zip(sums, taken.gradients, strict=True):
            total += gradient / INTEGRAL
    ways = (x - base for x, base in zip(whole.inputs, whole.bases, strict=True))
    found = subject.spread(tuple(way * g for way, g in zip(ways, sums, strict=True)))
    return Shares(found[:-1], float(found[-1]), whole.value, nothing.value)


def occlusion(subject: Subject) -> Steps[Shares]:
    """What the log-probability loses without each unit by itself (Zeiler and Fergus 2014)."""
    kept = torch.ones(subject.units + 2, subject.units, dtype=torch.bool)
    kept[range(subject.units), range(subject.units)] = False
    kept[-1] = False
    found = yield from likelihoods(subject, kept)
    whole = found[-2]
    return Shares(whole - found[:-2], 0.0, float(whole), float(found[-1]))


def chance(subject: Subject) -> Steps[Shares]:
    """Figures drawn at random, of nothing: what any method has to be better than."""
    yield
    drawn = torch.rand(subject.units, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    return Shares(drawn - drawn.mean(), 0.0, 0.0, 0.0)


def likelihoods(subject: Subject, kept: torch.Tensor) -> Steps[torch.Tensor]:
    """`Subject.likelihood` of any number of rows `[R, U]`: `[R]`. Rows that are alike are asked once."""
    rows, which = torch.unique(kept, dim=0, return_inverse=True)
    parts = []
    for begin in range(0, len(rows), ROWS):
        parts.append((yield from subject.likelihood(rows[begin : begin + ROWS])))
    return torch.cat(parts)[which]


METHODS: dict[Method, Callable[[Subject], Steps[Shares]]] = {
    "lrp": relevance,
    "occlusion": occlusion,
    "integrated_gradients": integrated_gradients,
    "gradient_x_input": gradient_x_input,
    "random": chance,
}
