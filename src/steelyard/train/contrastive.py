"""The task of sentence embeddings: which of many texts belongs to one, by likeness (InfoNCE: van den Oord et al. 2018).

The other texts of a forward pass are what a text is told apart from, so here it matters how a batch is cut:
`micro_batch_tokens` should hold a whole one.
"""

# P pairs  D width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from steelyard.errors import TrainingError
from steelyard.models import encoders
from steelyard.models.encoders import SentenceModel
from steelyard.models.inputs import padded

SCALE = 20.0
"""By which cosines become logits, as Sentence-BERT has it."""
TOGETHER = 64
"""Pairs that are told apart when they are measured."""
Pair = tuple[Sequence[int], Sequence[int]]


class Contrastive:
    """See `Task`.

    Args:
        model: the encoder with its tokenizer, changed in place.
        learnt: pairs of rows of token ids that belong together.
        held: pairs to validate on; empty: nothing is measured.
        dtype: of weights and activations.

    Raises:
        TrainingError: there is no pair.
    """

    padded, whole = True, True

    def __init__(
        self,
        model: SentenceModel,
        learnt: Sequence[Pair],
        held: Sequence[Pair],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not learnt:
            raise TrainingError("no pair is left to learn from")
        self.model, self._learnt, self._held = model, learnt, held
        self.rows = len(learnt)
        model.network.to(dtype)
        self.parameters: dict[str, torch.Tensor] = dict(model.network.named_parameters())

    def size(self, row: int) -> int:
        """Tokens of both texts."""
        return sum(map(len, self._learnt[row]))

    def targets(self, rows: Sequence[int]) -> int:
        """Each text of a pair finds the other."""
        return 2 * len(rows)

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """-log p of the text that belongs to each, among all others of this forward pass, in nats."""
        return self._scores([self._learnt[row] for row in rows])[0]

    def _scores(self, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss, and the logits `[P, P]`."""
        left, right = (self.model.network.embed(*padded([pair[side] for pair in pairs])) for side in (0, 1))
        logits = SCALE * left @ right.T
        own = torch.arange(len(pairs))
        both = F.cross_entropy(logits, own, reduction="sum") + F.cross_entropy(logits.T, own, reduction="sum")
        return both, logits

    def train(self, on: bool) -> None:
        """Dropout."""
        self.model.network.train(on)

    def evaluate(self) -> Mapping[str, float]:
        """The loss on the held pairs, and how often the right text is the most alike, among 64 at most."""
        if not self._held:
            return {}
        nats, right = 0.0, 0
        for start in range(0, len(self._held), TOGETHER):
            loss, logits = self._scores(self._held[start : start + TOGETHER])
            nats += float(loss)
            right += int((logits.argmax(1) == torch.arange(len(logits))).sum())
        return {"validation_loss": nats / (2 * len(self._held)), "validation_accuracy": right / len(self._held)}

    def save(self, folder: Path) -> None:
        """An encoder, in Hugging Face's layout."""
        encoders.save_sentence(self.model, folder)
