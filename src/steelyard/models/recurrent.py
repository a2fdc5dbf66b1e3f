"""The recurrent classifier: Embedding, an LSTM over the sequence, an LSTM to its end, Dense ReLU, Dense softmax.

Hochreiter and Schmidhuber 1997. Rows of a batch are padded on the right, which an LSTM that reads from the left has not
seen when it comes to a row's last token.
"""

# B rows  L longest row  E embedding  H hidden  C classes

from __future__ import annotations

import msgspec
import torch
from torch import nn

from steelyard.models.dropout import Dropout


class RecurrentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of the network."""

    vocab_size: int
    embedding_size: int = 64
    hidden_size: int = 64
    """Of both LSTMs."""
    dense_size: int = 64
    dropout: float = 0.2
    """Of embeddings and of the dense layer's input, while it is trained."""
    classes: int = 2


class RecurrentClassifier(nn.Module):
    """See the module."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.sequence = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.summary = nn.LSTM(config.hidden_size, config.hidden_size, batch_first=True)
        self.dense = nn.Linear(config.hidden_size, config.dense_size)
        self.classifier = nn.Linear(config.dense_size, config.classes)
        self.dropout = Dropout(config.dropout)

    @property
    def context(self) -> int | None:
        """Most tokens of a row; None: any number."""
        return None

    def forward(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Token ids `[B, L]` int64, whatever stands behind each row's length `[B]` -> logits `[B, C]`."""
        states, _ = self.sequence(self.dropout(self.embedding(token_ids)))
        states, _ = self.summary(states)
        last = states[torch.arange(lengths.shape[0]), lengths - 1]
        logits: torch.Tensor = self.classifier(torch.relu(self.dense(self.dropout(last))))
        return logits
