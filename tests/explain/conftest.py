"""Tiny networks that learnt something, and a decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deciding import learnt
from steelyard.models.classifiers import Classifier
from steelyard.models.encoder import EncoderClassifier, EncoderConfig
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig


@pytest.fixture(scope="session", params=["recurrent", "encoder"])
def classifier(request: pytest.FixtureRequest, tiny_tokenizer_folder: Path) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "recurrent":
            sizes = {"embedding_size": 16, "hidden_size": 16, "dense_size": 16}
            return learnt(RecurrentClassifier(RecurrentConfig(vocab_size=512, **sizes)), tiny_tokenizer_folder)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        config = EncoderConfig(vocab_size=512, max_position_embeddings=64, classes=2, **sizes)
        return learnt(EncoderClassifier(config), tiny_tokenizer_folder)
