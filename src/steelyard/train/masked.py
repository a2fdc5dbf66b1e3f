"""The task of an encoder that learns from plain text: what stood where some was hidden (Devlin et al. 2019)."""

# B rows  L longest row  N hidden tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from steelyard.errors import TrainingError
from steelyard.models import encoders
from steelyard.models.encoders import MaskedModel
from steelyard.models.inputs import padded

SHARE = 0.15
"""Of the tokens that are to be found again."""
MASKED, RANDOM = 0.8, 0.1
"""Of these: how many are hidden, and how many are another token; the rest stands as it is."""
IGNORED = -100


class MaskedLanguage:
    """See `Task`.

    Args:
        model: the network with its tokenizer, changed in place.
        learnt: rows of token ids to learn from.
        held: rows to validate on, hidden in the same places each time; empty: nothing is measured.
        dtype: of weights and activations.

    Raises:
        TrainingError: there is no row.
    """

    padded, whole = True, False

    def __init__(
        self,
        model: MaskedModel,
        learnt: Sequence[Sequence[int]],
        held: Sequence[Sequence[int]],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not learnt:
            raise TrainingError("no row is left to learn from")
        self.model, self._learnt = model, learnt
        generator = torch.Generator().manual_seed(0)
        self._held = [hide(*padded([row]), model, generator) for row in held]
        self.rows = len(learnt)
        model.network.to(dtype)
        self.parameters: dict[str, torch.Tensor] = dict(model.network.named_parameters())

    def size(self, row: int) -> int:
        """Tokens."""
        return len(self._learnt[row])

    def targets(self, rows: Sequence[int]) -> int:
        """How many tokens are to be found: rounded, at least one a row, so that it is known before they are drawn."""
        return sum(hidden_of(len(self._learnt[row])) for row in rows)

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """-log p of the hidden tokens, in nats."""
        token_ids, lengths = padded([self._learnt[row] for row in rows])
        shown, wanted = hide(token_ids, lengths, self.model, None)
        return self._loss(shown, wanted, lengths)

    def _loss(self, shown: torch.Tensor, wanted: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        places = (wanted != IGNORED).flatten().nonzero().flatten()
        logits = self.model.network(shown, lengths, places)
        return F.cross_entropy(logits.float(), wanted.flatten()[places], reduction="sum")

    def train(self, on: bool) -> None:
        """Dropout."""
        self.model.network.train(on)

    def evaluate(self) -> Mapping[str, float]:
        """The loss on the held rows, each alone."""
        if not self._held:
            return {}
        nats, count = 0.0, 0
        for shown, wanted in self._held:
            nats += float(self._loss(shown, wanted, torch.tensor([shown.shape[1]])))
            count += int((wanted != IGNORED).sum())
        return {"validation_loss": nats / count}

    def save(self, folder: Path) -> None:
        """A model with its head, in Hugging Face's layout."""
        encoders.save_masked(self.model, folder)


def hidden_of(length: int) -> int:
    """How many of so many tokens are to be found."""
    return max(1, round(SHARE * length))


def hide(
    token_ids: torch.Tensor, lengths: torch.Tensor, model: MaskedModel, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[B, L]` with some hidden, and what is to be found there (else `IGNORED`), drawn anew each time."""
    scores = torch.rand(token_ids.shape, generator=generator)
    scores[torch.arange(token_ids.shape[1]) >= lengths[:, None]] = 2.0
    ranks = scores.argsort(1).argsort(1)
    wanted = ranks < torch.tensor([hidden_of(length) for length in lengths.tolist()])[:, None]
    fate = torch.rand(token_ids.shape, generator=generator)
    other = torch.randint(0, model.network.config.vocab_size, token_ids.shape, generator=generator)
    shown = torch.where(wanted & (fate < MASKED), model.mask, token_ids)
    shown = torch.where(wanted & (fate >= MASKED) & (fate < MASKED + RANDOM), other, shown)
    return shown, torch.where(wanted, token_ids, IGNORED)
