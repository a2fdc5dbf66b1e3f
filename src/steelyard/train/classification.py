"""The task of a classifier: which of some classes an example belongs to; of a tagger, each word of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F

from steelyard.errors import TrainingError
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier

Metric = Callable[[torch.Tensor], float]
Batch = tuple[Any, ...]


class Labelled(msgspec.Struct, frozen=True):
    """Examples as the classifier's inputs take them, and the numbers of their classes."""

    examples: Any
    """A list, or a tensor of them."""
    labels: list[Sequence[int]]
    """One of each example, or one of each of its words."""


class Classification:
    """See `Task`.

    Args:
        classifier: the network, changed in place.
        learnt: what to learn from.
        held: what to validate on; empty: nothing is measured.
        metrics: of the counts `[C, C]` of truth and prediction.
        dtype: of weights and activations.
        smoothing: share of every target that all classes have alike (Szegedy et al. 2016).
        augment: what is done to a batch while it is learnt from.

    Raises:
        TrainingError: there is no row.
    """

    padded, whole = True, False

    def __init__(
        self,
        classifier: Classifier,
        learnt: Labelled,
        held: Labelled,
        metrics: Mapping[str, Metric],
        *,
        dtype: torch.dtype = torch.float32,
        smoothing: float = 0.0,
        augment: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        if not learnt.labels:
            raise TrainingError("no row is left to learn from")
        self.classifier, self._learnt, self._held, self._metrics = classifier, learnt, held, metrics
        self._smoothing, self._augment = smoothing, augment
        self.rows = len(learnt.labels)
        classifier.network.to(dtype)
        self.parameters: dict[str, torch.Tensor] = dict(classifier.network.named_parameters())

    def size(self, row: int) -> int:
        """Tokens, patches, frames."""
        return self.classifier.inputs.size(self._learnt.examples[row])

    def targets(self, rows: Sequence[int]) -> int:
        """One a row, or one a word."""
        return sum(len(self._learnt.labels[row]) for row in rows)

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """-log p of the labels, in nats."""
        batch, truth = self._batch(rows)
        return self._losses(self.classifier.network(*batch), truth).sum()

    def _batch(self, rows: Sequence[int]) -> tuple[Batch, torch.Tensor]:
        """What the network is given, and the numbers of the classes `[N]`."""
        batch = self._augment(self.classifier.inputs.batch([self._learnt.examples[row] for row in rows]))
        return batch, torch.tensor([label for row in rows for label in self._learnt.labels[row]])

    def _losses(self, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Of each of `[N]`, from `[N, C]`."""
        return F.cross_entropy(logits.float(), truth, reduction="none", label_smoothing=self._smoothing)

    def train(self, on: bool) -> None:
        """Dropout."""
        self.classifier.network.train(on)

    def evaluate(self) -> Mapping[str, float]:
        """The loss on the held rows, and how well they are told apart."""
        if not self._held.labels:
            return {}
        scores = classifiers.log_probabilities(self.classifier, self._held.examples)
        truth = torch.tensor([label for labels in self._held.labels for label in labels])
        size = len(self.classifier.labels)
        counts = (truth * size + self._decided(scores)).bincount(minlength=size * size).view(size, size)
        loss = float(F.nll_loss(scores, truth))
        return {"validation_loss": loss, **{name: metric(counts) for name, metric in self._metrics.items()}}

    def _decided(self, scores: torch.Tensor) -> torch.Tensor:
        """Which class each of the held rows is given, `[N]`, of its log-probabilities."""
        return scores.argmax(1)

    def save(self, folder: Path) -> None:
        """A classifier of its own."""
        classifiers.save(self.classifier, folder)
