"""Text, image and sound together, by the stages that users call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile
import torch

from interrupted import ends_the_same
from several_kinds import ALL, configuration, write_rows
from steelyard.data.augmentation import Augmentation
from steelyard.data.chat import FormatConfig
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.models import classifiers
from steelyard.models.fusion import MODALITIES
from steelyard.models.inputs import Fused
from steelyard.stages.evaluate import evaluate
from steelyard.stages.labelling import Classification
from steelyard.stages.predict import predict
from steelyard.stages.train import train
from steelyard.train.networks import FusionNetwork


@pytest.mark.parametrize("how", ["late", "gated", "cross-attention"])
def test_from_rows_to_a_prediction(how: Any, tmp_path: Path) -> None:
    network = msgspec.structs.replace(ALL, how=how)
    done = train(configuration(tmp_path, network=network, augment=Augmentation(flip=True), epochs=16))
    held = write_rows(tmp_path / "held", 60, 1)
    found = evaluate(Path(str(done.path)), held, FormatConfig())
    assert isinstance(found, Classification)
    assert found.accuracy > 0.8
    assert found.ablation is not None
    expected = [*(f"{name} alone" for name in MODALITIES), *(f"without {name}" for name in MODALITIES)]
    assert list(found.ablation) == expected
    assert found.ablation["text alone"][0] < 0.75, "words tell one bit of two"
    assert found.ablation["without audio"][0] > found.ablation["text alone"][0]
    assert predict(Path(str(done.path)), held, tmp_path / "out.jsonl", FormatConfig()) == 60
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sum(row["label"] == row["prediction"] for row in rows) == round(found.accuracy * 60)


@pytest.mark.parametrize("how", ["late", "gated", "cross-attention"])
def test_a_row_depends_on_no_other_and_on_nothing_that_it_lacks(how: Any, tmp_path: Path) -> None:
    done = train(configuration(tmp_path, network=msgspec.structs.replace(ALL, how=how), epochs=1))
    classifier = classifiers.load(Path(str(done.path)))
    torch.manual_seed(0)
    picture, features = torch.randint(0, 256, (1, 8, 8)).to(torch.uint8), torch.randn(80, 31)
    examples = [
        Fused([5, 6, 7], picture, features),
        Fused([8], None, None),
        Fused(None, picture, None),
        Fused(None, None, features[:, :20]),
        Fused([5, 6], None, features),
    ]
    together = classifiers.log_probabilities(classifier, examples)
    alone = torch.cat([classifiers.log_probabilities(classifier, [example]) for example in examples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[4])
    with pytest.raises(CheckpointError, match="reads no texts"):
        classifier.text  # noqa: B018
    with pytest.raises(CheckpointError, match="its labels cannot be others"):
        classifiers.on_trained(Path(str(done.path)), ["x", "y"], torch.Generator())


def test_an_interrupted_run_ends_the_same(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epochs": 2, "augment": Augmentation(shift=1)}
    ends_the_same(tmp_path, lambda folder: configuration(folder, checkpoint_every=3, **fields), (5, 11))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"label": "a"}, "none of text, image, audio is there"),
        ({"text": 3, "label": "a"}, "field 'text': must be a text"),
        ({"text": "a"}, "field 'label': has no label"),
        ({"image": "none.png", "label": "a"}, "cannot be read"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    config = configuration(tmp_path)
    path = Path(config.data.train)
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"rows.jsonl:161: .*{complaint}"):
        train(config)


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        (FusionNetwork(modalities=()), "must not be empty"),
        (FusionNetwork(modalities=("image", "text")), "in this order"),
        (FusionNetwork(width=30, heads=4), "must divide network.width"),
        (FusionNetwork(drop_modality=1.0), "network.drop_modality"),
        (FusionNetwork(alone=1.5), "network.alone must be 0 to 1, not 1.5"),
        (FusionNetwork(alone=1.0), "network.alone must be below 1"),
    ],
)
def test_a_wrong_setting_is_named(network: FusionNetwork, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(configuration(tmp_path, network=network))


def test_all_of_it_in_bfloat16(tmp_path: Path) -> None:
    done = train(configuration(tmp_path, dtype="bfloat16", epochs=1))
    assert done.finished


def test_a_text_that_is_too_long_is_named(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    path = Path(config.data.train)
    path.write_text(path.read_text() + json.dumps({"text": "word " * 400, "label": "00"}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:161: \d+ tokens, at most 128 fit"):
        train(config)
    for number, way in enumerate(("truncate", "drop", "keep")):
        data = msgspec.structs.replace(config.data, too_long=way)
        asked = msgspec.structs.replace(config, data=data, epochs=1, output=str(tmp_path / f"run{number}"))
        if way == "keep":
            with pytest.raises(ConfigError, match=r"data\.too_long 'keep' is not known"):
                train(asked)
        else:
            assert train(asked).finished


def test_a_sound_that_is_too_long_is_named(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    path = Path(config.data.train)
    soundfile.write(path.parent / "long.wav", np.random.default_rng(0).normal(0, 0.1, 31 * 8000), 8000)
    path.write_text(path.read_text() + json.dumps({"audio": "long.wav", "label": "00"}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:161: 31 s of sound, at most 30 fit"):
        train(config)
