"""The task of a classifier: which of some labels a text has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F

from steelyard.errors import TrainingError
from steelyard.models import classifiers
from steelyard.models.classifiers import TextClassifier

Metric = Callable[[torch.Tensor], float]


class LabelledText(msgspec.Struct, frozen=True):
    """A row."""

    tokens: list[int]
    label: int


class TextClassification:
    """See `Task`.

    Args:
        classifier: the network, changed in place.
        rows: what to learn from.
        held: what to validate on; empty: nothing is measured.
        metrics: of the counts `[C, C]` of truth and prediction.
        dtype: of weights and activations.

    Raises:
        TrainingError: there is no row.
    """

    def __init__(
        self,
        classifier: TextClassifier,
        rows: Sequence[LabelledText],
        held: Sequence[LabelledText],
        metrics: Mapping[str, Metric],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not rows:
            raise TrainingError("no row is left to learn from")
        self.classifier, self._rows, self._held, self._metrics = classifier, rows, held, metrics
        self.padded = True
        self.rows = len(rows)
        classifier.network.to(dtype)
        self.parameters: dict[str, torch.Tensor] = dict(classifier.network.named_parameters())

    def size(self, row: int) -> int:
        """Tokens."""
        return len(self._rows[row].tokens)

    def targets(self, rows: Sequence[int]) -> int:
        """One a row."""
        return len(rows)

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """-log p of the labels, in nats."""
        chosen = [self._rows[row] for row in rows]
        logits = self.classifier.network(*classifiers.padded([row.tokens for row in chosen]))
        return F.cross_entropy(logits.float(), torch.tensor([row.label for row in chosen]), reduction="sum")

    def train(self, on: bool) -> None:
        """Dropout."""
        self.classifier.network.train(on)

    def evaluate(self) -> Mapping[str, float]:
        """The loss on the held rows, and how well they are told apart."""
        if not self._held:
            return {}
        scores = classifiers.log_probabilities(self.classifier, [row.tokens for row in self._held])
        truth = torch.tensor([row.label for row in self._held])
        size = len(self.classifier.labels)
        counts = (truth * size + scores.argmax(1)).bincount(minlength=size * size).view(size, size)
        loss = float(F.nll_loss(scores, truth))
        return {"validation_loss": loss, **{name: metric(counts) for name, metric in self._metrics.items()}}

    def save(self, folder: Path) -> None:
        """A classifier of its own."""
        classifiers.save(self.classifier, folder)
