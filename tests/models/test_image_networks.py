"""Networks that read images: against Hugging Face's ViT, each row by itself, saved and opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from steelyard.errors import CheckpointError
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.convnet import ConvNet, ConvNetConfig
from steelyard.models.images import normalised
from steelyard.models.inputs import ImageInputs
from steelyard.models.vision import VisionConfig, VisionTransformer

LABELS = ("a", "b", "c")
CONV = ConvNetConfig(image_size=12, num_channels=1, widths=(8, 12), blocks=1, classes=3)
VIT = VisionConfig(
    image_size=12,
    patch_size=4,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    classes=3,
)


def batch(count: int, channels: int, side: int = 12) -> torch.Tensor:
    shape = (count, channels, side, side)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def made(config: ConvNetConfig | VisionConfig) -> Classifier:
    torch.manual_seed(0)
    network = ConvNet(config) if isinstance(config, ConvNetConfig) else VisionTransformer(config)
    return Classifier(network.eval(), ImageInputs(config.num_channels, config.image_size), LABELS)


@pytest.mark.parametrize(("side", "patch", "channels"), [(12, 4, 3), (8, 8, 1), (6, 1, 3)])
def test_the_vision_transformer_is_hugging_faces(side: int, patch: int, channels: int) -> None:
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    shared |= {"image_size": side, "patch_size": patch, "num_channels": channels}
    reference = ViTForImageClassification(ViTConfig(**shared, num_labels=3, hidden_act="gelu")).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.3)
    network = VisionTransformer(VisionConfig(**shared, classes=3)).eval()
    network.load_state_dict(reference.state_dict())
    images = batch(4, channels, side)
    with torch.no_grad():
        expected = reference(normalised(images, network.config, torch.float32)).logits
        torch.testing.assert_close(network(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [CONV, VIT])
def test_a_row_depends_on_no_other_not_even_while_it_is_learnt_from(config: Any) -> None:
    network = made(
        msgspec.structs.replace(config, **({"dropout": 0.0} if config is CONV else {"hidden_dropout_prob": 0.0}))
    )
    images = batch(5, config.num_channels)
    network.network.train()
    together = network.network(images)
    for number in range(5):
        torch.testing.assert_close(together[number : number + 1], network.network(images[number : number + 1]))


@pytest.mark.parametrize("config", [CONV, VIT])
def test_saved_and_opened(config: Any, tmp_path: Path) -> None:
    classifier = made(config)
    classifiers.save(classifier, tmp_path)
    assert classifiers.is_classifier(tmp_path)
    assert classifiers.reads_images(tmp_path)
    again = classifiers.load(tmp_path)
    assert again.network.config == config
    assert again.labels == LABELS
    images = batch(7, config.num_channels)
    assert torch.equal(classifiers.log_probabilities(again, images), classifiers.log_probabilities(classifier, images))
    with pytest.raises(CheckpointError, match="reads no texts"):
        again.text  # noqa: B018


@pytest.mark.parametrize("config", [CONV, VIT])
def test_a_new_head_on_what_was_learnt(config: Any, tmp_path: Path) -> None:
    classifier = made(config)
    classifiers.save(classifier, tmp_path)
    swapped = classifiers.on_trained(tmp_path, ["x", "y"], torch.Generator().manual_seed(0))
    images = batch(3, config.num_channels)
    assert swapped.network(images).shape == (3, 2)
    assert torch.equal(swapped.network.features(images), classifier.network.features(images))  # type: ignore[union-attr]
    same = classifiers.on_trained(tmp_path, LABELS, torch.Generator().manual_seed(0))
    assert torch.equal(same.network(images), classifier.network(images))


@pytest.mark.parametrize(
    ("config", "fields", "complaint"),
    [
        (CONV, {"image_size": 0}, "image_size"),
        (CONV, {"num_channels": 2}, "num_channels"),
        (CONV, {"image_std": (0.0,)}, "image_std"),
        (CONV, {"image_mean": (0.1, 0.2)}, "image_mean"),
        (CONV, {"widths": ()}, "widths"),
        (VIT, {"patch_size": 5}, "patch_size must divide"),
        (VIT, {"num_attention_heads": 3}, "num_attention_heads must divide"),
    ],
)
def test_what_does_not_fit_is_named(config: Any, fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    raw = {**msgspec.to_builtins(config), **fields}
    classifiers.save(made(config), tmp_path)
    path = tmp_path / "config.json"
    known = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**known, **{key: raw[key] for key in fields}}))
    with pytest.raises(CheckpointError, match=complaint):
        classifiers.load(tmp_path)
