"""Classifiers of images by the stages that users call: folders in, predictions out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drawn import CONV, VIT, configuration, draw
from interrupted import ends_the_same
from steelyard.data.augmentation import Augmentation
from steelyard.data.chat import FormatConfig
from steelyard.errors import ConfigError, DataError
from steelyard.stages.evaluate import evaluate
from steelyard.stages.labelling import Classification
from steelyard.stages.predict import predict
from steelyard.stages.train import train
from steelyard.train.config import DataConfig
from steelyard.train.networks import ConvNetwork, VitNetwork


@pytest.mark.parametrize("network", [CONV, VIT])
def test_from_nothing_to_a_prediction(network: Any, tmp_path: Path) -> None:
    done = train(configuration(tmp_path, network=network, epochs=20, label_smoothing=0.05))
    assert done.path is not None
    assert done.metrics["validation_accuracy"] > 0.9
    held = draw(tmp_path / "held", 40, 1)
    found = evaluate(Path(done.path), held, FormatConfig())
    assert isinstance(found, Classification)
    assert found.accuracy > 0.85
    assert predict(Path(done.path), held, tmp_path / "out.jsonl", FormatConfig()) == 40
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = sum(row["image"].startswith(row["prediction"]) for row in rows)
    assert right == round(found.accuracy * 40)


def test_an_interrupted_run_ends_the_same(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epochs": 4, "augment": Augmentation(flip=True, shift=1, erase=3)}
    ends_the_same(tmp_path, lambda folder: configuration(folder, checkpoint_every=3, **fields), (5, 17))


def test_how_a_batch_is_cut_changes_nothing(tmp_path: Path) -> None:
    losses = []
    for tokens in (4096, 7):
        config = configuration(tmp_path / str(tokens), epochs=1, micro_batch_tokens=tokens)
        done = train(config)
        losses.append(done.metrics["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_transfer_to_other_classes(tmp_path: Path) -> None:
    first = train(configuration(tmp_path, epochs=12))
    second = tmp_path / "second"
    draw(second / "images", 60, 2, ("spots", "lines"))
    (second / "images" / "lines").rename(second / "images" / "strokes")
    config = configuration(second, network=None, model=first.path, epochs=8, dtype="float32")
    done = train(config)
    assert done.metrics["validation_accuracy"] > 0.8
    assert json.loads((Path(str(done.path)) / "steelyard.json").read_text())["parent"] == first.id


def test_bad_files_are_left_out_and_told(tmp_path: Path) -> None:
    draw(tmp_path / "images", 40, 0)
    (tmp_path / "images" / "lines" / "0.png").write_text("broken")
    data = DataConfig(train=str(tmp_path / "images"), holdout=5, bad_files=1)
    done = train(configuration(tmp_path, data=data, epochs=1))
    assert done.data["rows"] + done.data["validation_rows"] == 40
    assert "left out" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(DataError, match=r"0\.png' is no PNG.*data.bad_files"):
        train(configuration(tmp_path, data=DataConfig(train=str(tmp_path / "images"), holdout=5), epochs=1), fresh=True)


def test_the_same_image_is_not_validated_on(tmp_path: Path) -> None:
    draw(tmp_path / "images", 20, 0)
    draw(tmp_path / "held", 20, 0)
    data = DataConfig(train=str(tmp_path / "images"), validation=str(tmp_path / "held"))
    with pytest.raises(DataError, match="would be too kind"):
        train(configuration(tmp_path, data=data))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"augment": Augmentation(shift=-1)}, "augment.shift"),
        ({"network": ConvNetwork(channels=2)}, "network.channels"),
        ({"network": ConvNetwork(widths=())}, "network.widths"),
        ({"network": VitNetwork(image_size=30, patch=8)}, "must divide network.image_size"),
        ({"network": VitNetwork(hidden=30, heads=4)}, "must divide network.hidden"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"data": DataConfig(train="x", max_length=9)}, "data.max_length means nothing to a classifier of images"),
        ({"data": DataConfig(train="x", bad_files=-1)}, "data.bad_files must be at least 0"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(configuration(tmp_path, **fields))


def test_texts_are_not_augmented(tmp_path: Path) -> None:
    from steelyard.train.networks import LstmNetwork

    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n')
    data = DataConfig(train=str(tmp_path / "rows.jsonl"))
    config = configuration(tmp_path, data=data, network=LstmNetwork(), augment=Augmentation(flip=True))
    with pytest.raises(ConfigError, match=r"augment\.flip changes images"):
        train(config)
