"""The task of a decoder: the next token of rows, learnt by an adapter or by all weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from steelyard.data.packing import pack
from steelyard.data.token_rows import TokenRows
from steelyard.errors import TrainingError
from steelyard.kernels.recompute import recomputing
from steelyard.models import head_tokens, weights
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.head_tokens import Head
from steelyard.models.lora import Adapter
from steelyard.train.losses import cross_entropy

Evaluator = Callable[[Decoder, Adapter | None], Mapping[str, float]]


class LanguageModelling:
    """See `Task`.

    Args:
        decoder: the base model; changed in place without an adapter, left alone with one.
        adapter: what is learnt; None trains all weights.
        rows: what to learn from.
        base: the base's folder, for what is saved.
        evaluator: measures on the way.

    Raises:
        TrainingError: there is no row.
    """

    def __init__(
        self,
        decoder: Decoder,
        adapter: Adapter | None,
        rows: TokenRows,
        base: Path,
        evaluator: Evaluator | None = None,
    ) -> None:
        if not rows:
            raise TrainingError("no row is left to learn from")
        self.decoder, self.adapter, self.base, self.evaluator = decoder, adapter, base, evaluator
        self.padded = self.whole = False
        kept, vocabulary = head_tokens.read(base, decoder.config.vocabulary), decoder.config.vocabulary
        self._head = None if kept is None else Head(kept, vocabulary)
        """Of a draft: what is not among its tokens is not learnt."""
        self.rows, self._rows = len(rows), rows
        self.parameters = dict(adapter.parameters() if adapter else decoder.named_parameters())
        if adapter is None:  # weights may be mapped from a file: train a copy
            for tensor in self.parameters.values():
                tensor.data = tensor.data.clone()

    def size(self, row: int) -> int:
        """Tokens, trained or not."""
        return int(self._rows.lengths[row])

    def targets(self, rows: Sequence[int]) -> int:
        """Tokens that the loss counts."""
        return int(self._rows.targets[list(rows)].sum())

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """-log p of the trained tokens, in nats."""
        batch = pack([self._rows[row] for row in rows])
        with recomputing():
            hidden_states = self.decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths), self.adapter)
        head, places, targets = self.decoder.lm_head.weight, batch.places, batch.targets
        if self._head is not None:
            there, targets = self._head.known(targets)
            head, places = self._head.rows(head), places[there]
        return cross_entropy(hidden_states.index_select(0, places), head, targets)

    def train(self, on: bool) -> None:
        """Dropout is the adapter's."""
        if self.adapter is not None:
            self.adapter.training = on

    def evaluate(self) -> Mapping[str, float]:
        """What the evaluator says."""
        return {} if self.evaluator is None else self.evaluator(self.decoder, self.adapter)

    def save(self, folder: Path) -> None:
        """An adapter, or a whole model."""
        if self.adapter is not None:
            self.adapter.save(folder, str(self.base))
        else:
            weights.save(self.decoder, folder, self.base)
