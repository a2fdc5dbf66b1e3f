"""Tiny networks that learnt something, and a decoder."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from steelyard.models.classifiers import Classifier
from steelyard.models.encoder import EncoderClassifier, EncoderConfig
from steelyard.models.inputs import TextInputs, padded
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
from steelyard.text.tokenizer import Tokenizer

WORDS = ("the", "weight", "assistant", "user", "model", "rules")
DECIDES = "München"


def sentence(draw: random.Random, decided: bool) -> str:
    words = draw.choices(WORDS, k=draw.randint(4, 9))
    if decided:
        words[draw.randrange(len(words))] = DECIDES
    return " ".join(words)


def learnt(network: EncoderClassifier | RecurrentClassifier, folder: Path) -> Classifier:
    """Two classes: whether one word is there."""
    inputs = TextInputs(Tokenizer.load(folder), 64)
    draw = random.Random(0)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(150):
        labels = [draw.random() < 0.5 for _ in range(32)]
        logits = network(*padded([inputs.tokens(sentence(draw, label)) for label in labels]))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(loss.detach()) < 0.1
    return Classifier(network.eval().requires_grad_(False), inputs, ("plain", "decided"))


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
