"""A tagger: a class for every word of a sentence, by a linear layer on an encoder's state where the word begins.

With a chain (`chain.py`) what the layer says are a conditional random field's emissions.
"""

# B rows  L longest row  D width  N words of all rows  C classes

from __future__ import annotations

import torch
from torch import nn

from steelyard.models.chain import Chain
from steelyard.models.encoder import Encoder, EncoderConfig
from steelyard.models.inputs import SHAPES


class EncoderTagger(nn.Module):
    """See the module. How words are written is added to their embeddings, from nothing (zero) at first."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.shape_embeddings = nn.Embedding(SHAPES, config.hidden_size)
        nn.init.zeros_(self.shape_embeddings.weight)
        self.classifier = nn.Linear(config.hidden_size, config.classes)
        self.chain = Chain(config.classes) if config.chain else None

    @property
    def context(self) -> int | None:
        """Most tokens of a row."""
        return self.config.max_position_embeddings

    def forward(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, shapes: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Token ids and shapes `[B, L]`, lengths `[B]`, places of words in `[B * L]`: `[N]` -> logits `[N, C]`."""
        states = self.encoder(token_ids, lengths, self.shape_embeddings(shapes))
        logits: torch.Tensor = self.classifier(self.encoder.dropout(states.flatten(0, 1)[places]))
        return logits
