"""Direct preference optimisation: of two answers the preferred one becomes likelier, against the base as it was.

    J = - mean log sigmoid(beta ((log p(y+) - log p0(y+)) - (log p(y-) - log p0(y-))))

(Rafailov et al. 2023, equation 7.)

p0 is the base without the adapter, so there is one model in memory; its log-probabilities are computed once a row.
"""

# P pairs  N trained tokens of both answers

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from steelyard.data.packing import pack
from steelyard.data.rows import TokenRow
from steelyard.errors import TrainingError
from steelyard.kernels.recompute import recomputing
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter
from steelyard.train.losses import token_losses

Pair = tuple[TokenRow, TokenRow]
"""The preferred answer's row and the other's."""


class PreferenceLearning:
    """See `Task`.

    Args:
        decoder: the base model, left alone.
        adapter: what is learnt.
        pairs: what to learn from.
        held: what to validate on; empty: nothing is measured.
        beta: how strongly the base as it was holds.
        base: the base's folder, for what is saved.

    Raises:
        TrainingError: there is no pair.
    """

    def __init__(
        self, decoder: Decoder, adapter: Adapter, pairs: Sequence[Pair], held: Sequence[Pair], beta: float, base: Path
    ) -> None:
        if not pairs:
            raise TrainingError("no row is left to learn from")
        self.decoder, self.adapter, self.beta, self.base = decoder, adapter, beta, base
        self.padded = self.whole = False
        self.rows, self._pairs, self._held = len(pairs), pairs, held
        self.parameters = dict(adapter.parameters())
        self._before: dict[int, tuple[float, float]] = {}
        """By each pair's identity, the log-probabilities of its answers by the base."""

    def size(self, row: int) -> int:
        """Tokens of both answers, each with the prompt."""
        return sum(len(one.tokens) for one in self._pairs[row])

    def targets(self, rows: Sequence[int]) -> int:
        """One a pair."""
        return len(rows)

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """-log of the probability that the preferred answer is preferred, in nats."""
        return -F.logsigmoid(self._margins([self._pairs[row] for row in rows])).sum()

    def train(self, on: bool) -> None:
        """Dropout is the adapter's."""
        self.adapter.training = on

    def evaluate(self) -> Mapping[str, float]:
        """The loss on held pairs, the share of them that is told right, and by how much."""
        if not self._held:
            return {}
        margins = torch.cat([self._margins([pair]) for pair in self._held])
        return {
            "validation_loss": float(-F.logsigmoid(margins).mean()),
            "validation_accuracy": float((margins > 0).float().mean()),
            "validation_margin": float(margins.mean()),
        }

    def save(self, folder: Path) -> None:
        """An adapter."""
        self.adapter.save(folder, str(self.base))

    def _margins(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """`[P]` float32: beta times how much more the adapter has raised the preferred answer than the other."""
        with torch.no_grad():
            for pair in pairs:  # each alone, so that no neighbour matters and a run resumes to the bit
                if id(pair) not in self._before:
                    preferred, other = self._log_probabilities([pair], None)[0].tolist()
                    self._before[id(pair)] = preferred, other
        before = torch.tensor([self._before[id(pair)] for pair in pairs])
        raised = self._log_probabilities(pairs, self.adapter) - before
        return self.beta * (raised[:, 0] - raised[:, 1])

    def _log_probabilities(self, pairs: Sequence[Pair], adapter: Adapter | None) -> torch.Tensor:
        """Of each pair's answers, `[P, 2]` float32, in nats."""
        rows = [row for pair in pairs for row in pair]
        batch = pack(rows)
        with recomputing():
            hidden_states = self.decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths), adapter)
        losses = token_losses(hidden_states.index_select(0, batch.places), self.decoder.lm_head.weight, batch.targets)
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([row.targets for row in rows]))
        return -torch.zeros(len(rows)).index_add(0, owner, losses).view(-1, 2)
