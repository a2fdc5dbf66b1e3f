"""The task of a classifier of several modalities: they learn together, and each on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steelyard.train.classification import Classification


class FusedClassification(Classification):
    """See `Task`.

    Args:
        classifier: of a `FusionClassifier`.
        alone: share of the loss that the modalities bear each on its own; the rest is that of what they say together.
        others: see `Classification`.
    """

    def __init__(self, *classification: Any, alone: float, **others: Any) -> None:
        super().__init__(*classification, **others)
        self._alone = alone

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """-log p of the labels, in nats: jointly, and the mean over each row's modalities (Wang et al. 2020)."""
        if not self._alone:
            return super().loss(rows)
        (present, *given), truth = self._batch(rows)
        joined, each = self.classifier.network.with_each(present, *given)  # type: ignore[operator]
        share: torch.Tensor = present / present.sum(1, keepdim=True)
        apart = self._losses(each.flatten(0, 1), truth.repeat_interleave(each.shape[1])).view_as(share)
        return (1 - self._alone) * self._losses(joined, truth).sum() + self._alone * (apart * share).sum()
