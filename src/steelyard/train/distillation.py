"""Learning from a teacher: what it holds of every class is a target besides, or instead of, the label.

loss = (1 - w) CE(label) + w T^2 D(p, q), with p and q the softmax of the teacher's and the student's logits over T
(Hinton et al. 2015); a row without a label has the second alone.
"""

# N rows  C classes

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from steelyard.train.classification import Classification

Divergence = Literal["forward", "reverse", "jensen-shannon"]
UNLABELLED = -1
"""The number of the class of a row that has none."""


def divergence(teacher: torch.Tensor, student: torch.Tensor, kind: Divergence, temperature: float) -> torch.Tensor:
    """How far the student is from its teacher: `[N]` float32, nats, times T^2 so that its gradient keeps its size.

    Args:
        teacher: logits or log-probabilities `[N, C]`.
        student: likewise; gradients go to it alone.
        kind: forward: KL(p || q), which covers all that the teacher holds possible; reverse: KL(q || p), which keeps to
            what it holds likely; jensen-shannon: the mean of both against (p + q) / 2 (Lin 1991).
        temperature: T.
    """
    p, q = ((logits.float() / temperature).log_softmax(-1) for logits in (teacher, student))
    if kind == "jensen-shannon":
        middle = torch.stack([p, q]).logsumexp(0) - torch.log(torch.tensor(2.0))
        found = (_kl(p, middle) + _kl(q, middle)) / 2
    else:
        found = _kl(p, q) if kind == "forward" else _kl(q, p)
    return temperature**2 * found


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


class Distillation(Classification):
    """See `Task`.

    Args:
        classification: see `Classification`; rows without a label have `UNLABELLED`.
        teacher: `[rows, C]`, its log-probabilities.
        weight: w, above 0, at most 1.
        temperature: T.
        kind: see `divergence`.
        others: see `Classification`.
    """

    def __init__(
        self,
        *classification: Any,
        teacher: torch.Tensor,
        weight: float,
        temperature: float,
        kind: Divergence,
        **others: Any,
    ) -> None:
        super().__init__(*classification, **others)
        self._teacher, self._weight, self._temperature, self._kind = teacher, weight, temperature, kind

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """See the module; nats."""
        batch, truth = self._batch(rows)
        logits = self.classifier.network(*batch)
        known = truth != UNLABELLED
        own = self._losses(logits, truth.where(known, 0))
        theirs = divergence(self._teacher[list(rows)], logits, self._kind, self._temperature)
        share = torch.where(known, self._weight, 1.0)
        return ((1 - share) * own + share * theirs).sum()
