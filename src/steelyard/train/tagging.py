"""The task of a tagger whose labels are a chain: the sequence as a whole is what is likely or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steelyard.models import chain, classifiers
from steelyard.models.tagger import EncoderTagger
from steelyard.train.classification import Classification


class ChainTagging(Classification):
    """See `Task`. The classifier is a tagger with a chain."""

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """-log p of the labels of each sentence, in nats (Lafferty et al. 2001)."""
        network = self.classifier.network
        assert isinstance(network, EncoderTagger), "see the class"
        assert network.chain is not None, "see the class"
        batch, truth = self._batch(rows)
        counts = [len(self._learnt.labels[row]) for row in rows]
        emissions = chain.padded(network(*batch).float(), counts)
        labels = torch.nn.utils.rnn.pad_sequence(list(torch.split(truth, counts)), batch_first=True)
        return -chain.log_likelihood(network.chain.scores, emissions, torch.tensor(counts), labels).sum()

    def _decided(self, scores: torch.Tensor) -> torch.Tensor:
        """By Viterbi."""
        found = classifiers.tagged(self.classifier, self._held.examples)
        return torch.tensor([label for paths in found for label in paths[0].labels])
