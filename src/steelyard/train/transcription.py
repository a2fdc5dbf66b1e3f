"""The task of a recogniser: what is said in a recording, by connectionist temporal classification."""

# B rows  M mel bands  F frames

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F

from steelyard.errors import TrainingError
from steelyard.models import speech
from steelyard.models.inputs import padded_features
from steelyard.models.speech import Recogniser

Metric = Callable[[Sequence[str], Sequence[str]], float]


class Spoken(msgspec.Struct, frozen=True):
    """A row."""

    features: torch.Tensor
    """`[M, F]`."""
    text: str
    """As it is learnt: see `speech.normalised`."""


class Transcription:
    """See `Task`.

    Args:
        recogniser: the network, changed in place.
        learnt: what to learn from.
        held: what to validate on; empty: nothing is measured.
        metrics: of the true texts and those that were recognised.
        dtype: of weights and activations.
        augment: what is done to features `[M, F]` while they are learnt from.

    Raises:
        TrainingError: there is no row.
    """

    padded, whole = True, False

    def __init__(
        self,
        recogniser: Recogniser,
        learnt: Sequence[Spoken],
        held: Sequence[Spoken],
        metrics: Mapping[str, Metric],
        *,
        dtype: torch.dtype = torch.float32,
        augment: Callable[[torch.Tensor], torch.Tensor] = lambda features: features,
    ) -> None:
        if not learnt:
            raise TrainingError("no recording is left to learn from")
        self.recogniser, self._learnt, self._held, self._metrics = recogniser, learnt, held, metrics
        self._dtype, self._augment = dtype, augment
        self._numbers = {letter: number for number, letter in enumerate(recogniser.vocabulary, 1)}
        self.rows = len(learnt)
        recogniser.network.to(dtype)
        recogniser.network.encoder.embed_positions.requires_grad_(False)  # sines, which stay
        self.parameters: dict[str, torch.Tensor] = {
            name: parameter for name, parameter in recogniser.network.named_parameters() if parameter.requires_grad
        }

    def size(self, row: int) -> int:
        """Places."""
        return (self._learnt[row].features.shape[-1] + 1) // 2

    def targets(self, rows: Sequence[int]) -> int:
        """Characters."""
        return sum(len(self._learnt[row].text) for row in rows)

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """-log p of the texts, over all ways to lay them along the recordings, in nats."""
        chosen = [self._learnt[row] for row in rows]
        return self._loss([self._augment(row.features) for row in chosen], [row.text for row in chosen])

    def _loss(self, features: Sequence[torch.Tensor], texts: Sequence[str]) -> torch.Tensor:
        joined, frames = padded_features(features)
        logits = self.recogniser.network(joined.to(self._dtype), frames).float()
        targets = torch.tensor([self._numbers[letter] for text in texts for letter in text])
        lengths = torch.tensor([len(text) for text in texts])
        scores = logits.log_softmax(-1).transpose(0, 1)
        # a text that is too long for its recording has no way at all: it teaches nothing
        return F.ctc_loss(
            scores, targets, speech.places_of(frames), lengths, blank=0, reduction="sum", zero_infinity=True
        )

    def train(self, on: bool) -> None:
        """Dropout."""
        self.recogniser.network.train(on)

    def evaluate(self) -> Mapping[str, float]:
        """The loss on the held rows whose characters are all known, and how the texts of all are recognised."""
        if not self._held:
            return {}
        known = [row for row in self._held if all(letter in self._numbers for letter in row.text)]
        nats = sum(float(self._loss([row.features], [row.text])) for row in known)
        logits = speech.logits_of(self.recogniser, [row.features for row in self._held])
        heard = [speech.greedy(each, self.recogniser.vocabulary) for each in logits]
        texts = [row.text for row in self._held]
        loss = nats / max(1, sum(len(row.text) for row in known))
        return {"validation_loss": loss, **{name: metric(texts, heard) for name, metric in self._metrics.items()}}

    def save(self, folder: Path) -> None:
        """A recogniser of its own."""
        speech.save(self.recogniser, folder)
