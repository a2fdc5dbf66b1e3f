"""Texts with a word that decides, and networks that learn which."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from steelyard.models.classifiers import Classifier
from steelyard.models.encoder import EncoderClassifier
from steelyard.models.inputs import TextInputs, padded
from steelyard.models.recurrent import RecurrentClassifier
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
