"""How far a student is from its teacher, against float64; and what of a row's loss is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data import tokenizer_training
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
from steelyard.train.classification import Labelled
from steelyard.train.distillation import UNLABELLED, Distillation, Divergence, divergence

KINDS: tuple[Divergence, ...] = ("forward", "reverse", "jensen-shannon")


def softmax(logits: torch.Tensor, temperature: float) -> Any:
    powers = np.exp((logits.double().numpy() - logits.double().numpy().max(-1, keepdims=True)) / temperature)
    return powers / powers.sum(-1, keepdims=True)


@given(st.integers(2, 30), st.floats(0.25, 20), st.sampled_from(KINDS), st.integers(0, 99))
def test_it_is_the_divergence_in_float64(classes: int, temperature: float, kind: Divergence, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    teacher, student = (3 * torch.randn(5, classes, generator=draw) for _ in range(2))
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    middle = (p + q) / 2
    expected = {
        "forward": (p * np.log(p / q)).sum(-1),
        "reverse": (q * np.log(q / p)).sum(-1),
        "jensen-shannon": ((p * np.log(p / middle)).sum(-1) + (q * np.log(q / middle)).sum(-1)) / 2,
    }[kind]
    found = divergence(teacher, student, kind, temperature)
    torch.testing.assert_close(found.double(), torch.from_numpy(temperature**2 * expected), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_follows_gets_there(kind: Divergence) -> None:
    teacher, student = torch.randn(4, 6), torch.zeros(4, 6, requires_grad=True)
    optimizer = torch.optim.Adam([student], 0.1)
    for _ in range(400):
        optimizer.zero_grad()
        divergence(teacher, student, kind, 2.0).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(student.softmax(-1), teacher.softmax(-1), atol=5e-3, rtol=0.05)
    assert float(divergence(teacher, teacher, kind, 2.0).abs().max()) < 1e-5


def test_whose_share_of_the_loss_is_what(tmp_path: Path) -> None:
    tokenizer_training.train(["some words"] * 9, 300, tmp_path / "tokenizer.json", lowercase=True)
    torch.manual_seed(0)
    network = RecurrentClassifier(
        RecurrentConfig(vocab_size=400, embedding_size=8, hidden_size=8, dense_size=8, dropout=0.0, classes=3)
    )
    classifier = Classifier(network, classifiers.inputs_of(network, tmp_path), ("a", "b", "c"), None)
    rows = Labelled([[1, 2], [3], [4, 5, 6]], [(2,), (UNLABELLED,), (0,)])
    teacher = torch.randn(3, 3).log_softmax(-1)
    settings: dict[str, Any] = {"weight": 0.3, "temperature": 2.0, "kind": "forward", "smoothing": 0.1}
    task = Distillation(classifier, rows, Labelled([], []), {}, teacher=teacher.half(), **settings)
    task.train(False)
    logits = network(*classifier.inputs.batch([rows.examples[number] for number in (2, 0, 1)]))
    theirs = divergence(teacher.half()[[2, 0, 1]], logits, "forward", 2.0)
    own = torch.nn.functional.cross_entropy(logits[:2], torch.tensor([0, 2]), reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(task.loss([2, 0, 1]), 0.7 * own + 0.3 * theirs[:2].sum() + theirs[2])
