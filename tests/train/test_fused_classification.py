"""What classifiers of several modalities learn from: what they say together, and each on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steelyard.data import tokenizer_training
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.convnet import ConvNetConfig
from steelyard.models.encoder import EncoderConfig
from steelyard.models.fusion import FusionClassifier, FusionConfig
from steelyard.models.inputs import Fused
from steelyard.train.classification import Labelled
from steelyard.train.fusion import FusedClassification

TEXT = EncoderConfig(
    vocab_size=400,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
)
IMAGE = ConvNetConfig(image_size=8, num_channels=1, widths=(8,), blocks=1)
TRUTH = (0, 2, 1, 2)


def examples() -> list[Fused]:
    pictures = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return [
        Fused([1, 2, 3], pictures[0], None),
        Fused([4], None, None),
        Fused(None, pictures[1], None),
        Fused([5, 6], pictures[2], None),
    ]


def task(how: Any, alone: float, tmp_path: Path) -> FusedClassification:
    tokenizer_training.train(["some words"] * 9, 300, tmp_path / "tokenizer.json", lowercase=True)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 8, "heads": 2, "dropout": 0.0, "drop_modality": 0.0, "text": TEXT, "image": IMAGE}
    network = FusionClassifier(FusionConfig(how=how, alone=alone > 0, classes=3, **sizes))
    classifier = Classifier(network, classifiers.inputs_of(network, tmp_path), ("a", "b", "c"), None)
    rows = Labelled(examples(), [(number,) for number in TRUTH])
    made = FusedClassification(classifier, rows, Labelled([], []), {}, smoothing=0.1, alone=alone)
    made.train(False)
    return made


@pytest.mark.parametrize("how", ["late", "gated", "cross-attention"])
def test_the_loss_is_that_of_the_whole_and_of_the_mean_over_what_each_row_has(how: str, tmp_path: Path) -> None:
    """By hand, in float64, from the logits."""
    learnt = task(how, 0.3, tmp_path)
    inputs = learnt.classifier.inputs.batch(examples())
    network: Any = learnt.classifier.network
    joined, each = (logits.double() for logits in network.with_each(*inputs))

    def loss(logits: torch.Tensor, label: int) -> torch.Tensor:
        target = torch.full((3,), 0.1 / 3, dtype=torch.float64)
        target[label] += 0.9
        return -(target * logits.log_softmax(0)).sum()

    has = ((0, 1), (0,), (1,), (0, 1))
    expected = sum(
        0.7 * loss(joined[row], label) + 0.3 * sum(loss(each[row, kind], label) for kind in has[row]) / len(has[row])
        for row, label in enumerate(TRUTH)
    )
    torch.testing.assert_close(learnt.loss(range(4)).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined.float(), network(*inputs))


def test_what_is_joined_late_is_the_sum_of_what_each_says(tmp_path: Path) -> None:
    learnt = task("late", 0.5, tmp_path)
    network: Any = learnt.classifier.network
    joined, each = network.with_each(*learnt.classifier.inputs.batch(examples()))
    torch.testing.assert_close(joined[0], each[0].sum(0))
    torch.testing.assert_close(joined[1], each[1, 0])
    torch.testing.assert_close(joined[2], each[2, 1])


@pytest.mark.parametrize("alone", [0.0, 1.0])
def test_on_its_own_each_learns_whatever_the_others_say(alone: float, tmp_path: Path) -> None:
    """An image's tower hears of the text by the joint loss alone."""

    def slopes(text_bias: float) -> torch.Tensor:
        learnt = task("late", alone, tmp_path)
        network: Any = learnt.classifier.network
        network.join.classifiers["text"].bias.data[0] = text_bias
        torch.autograd.backward(learnt.loss(range(4)))
        found: torch.Tensor = network.towers["image"].project.weight.grad
        return found

    assert torch.equal(slopes(0.0), slopes(5.0)) == (alone == 1)
