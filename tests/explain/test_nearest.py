"""Rows that are alike by their gradients, against gradients that autograd takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steelyard.explain import nearest
from steelyard.explain.explainer import open_decoder
from steelyard.models.attention import PackedAttention
from steelyard.models.classifiers import Classifier
from steelyard.text.tokenizer import Tokenizer

TEXTS = ("the user model rules", "the München weight", "weight weight the", "München user")


def test_of_classes_are_the_last_layers_gradients(classifier: Classifier) -> None:
    examples = [classifier.text.tokens(text) for text in TEXTS]
    targets = [0, 1, 0, 1]
    found = nearest.of_classes(classifier, examples, targets)
    weight = classifier.network.classifier.weight  # type: ignore[union-attr]
    expected = []
    weight.requires_grad_(True)
    try:
        for example, target in zip(examples, targets, strict=True):
            logits = classifier.network(*classifier.inputs.batch([example]))
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([target]))
            expected.append(torch.autograd.grad(loss, weight)[0])
    finally:
        weight.requires_grad_(False)
    for row, one in enumerate(found):
        for other, two in enumerate(found):
            assert one.dot(two) == pytest.approx(float((expected[row] * expected[other]).sum()), rel=1e-3, abs=1e-9)


def test_of_answers_are_those_of_a_map_before_the_head(tiny_model: Path) -> None:
    """Rows of any length in one pack; the map is the identity and M, which is 0."""
    decoder, tokenizer = open_decoder(tiny_model), Tokenizer.load(tiny_model)
    rows = [
        (tokenizer.encode("The steelyard"), tokenizer.encode(" weighs exactly")),
        (tokenizer.encode("A model answers the user"), tokenizer.encode(".")),
        (tokenizer.encode("x"), tokenizer.encode(" sets the rules")),
    ]
    found = nearest.of_answers(decoder, None, rows)
    expected = []
    for prompt, answer in rows:
        tokens = torch.tensor(prompt + answer[:-1])
        with torch.no_grad():
            states = decoder(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)]))[len(prompt) - 1 :]
        change = torch.zeros(states.shape[1], states.shape[1], requires_grad=True)
        logits = decoder.logits(states + states @ change.T)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        expected.append(torch.autograd.grad(loss, change)[0])
    for row, one in enumerate(found):
        for other, two in enumerate(found):
            assert one.dot(two) == pytest.approx(float((expected[row] * expected[other]).sum()), rel=1e-3, abs=1e-4)


def test_the_likest_are_first_and_the_opposed_last() -> None:
    def gradient(x: float, y: float) -> nearest.Gradient:
        return nearest.Gradient(torch.tensor([[1.0]]), torch.tensor([[float(x), float(y)]]))

    others = [gradient(0, 1), gradient(2, 0.1), gradient(-1, 0), gradient(1, 1)]
    found = nearest.nearest(gradient(1, 0), others, 3)
    assert [row for row, _ in found] == [1, 3, 2]
    assert found[0][1] == pytest.approx(2 / (4.01**0.5))
    assert found[-1][1] == pytest.approx(-1)
