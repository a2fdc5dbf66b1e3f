"""Training that knows of rounding: what is evaluated and kept is on the grid, and loses less there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from interrupted import ends_the_same
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.data.chat import FormatConfig
from steelyard.errors import ConfigError
from steelyard.models import weights
from steelyard.models.linear import QuantizedLinear
from steelyard.stages.compress import quantize
from steelyard.stages.evaluate import Likelihood, evaluate
from steelyard.stages.train import train
from steelyard.train.config import DataConfig, RoundingConfig, TrainConfig
from steelyard.train.optimizers import OptimizerConfig


def configuration(model: Path, folder: Path, **fields: Any) -> TrainConfig:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"The user asks {number} times."}) + "\n" for number in range(40)))
    settings: dict[str, Any] = {
        "model": str(model),
        "output": str(folder / "run"),
        "data": DataConfig(train=str(rows)),
        "method": "full",
        "epochs": 6,
        "batch_size": 8,
        "dtype": "float32",
        "rounding": RoundingConfig(bits=4, group=16),
        "optimizer": OptimizerConfig(name="adamw", learning_rate=3e-3),
    }
    return TrainConfig(**{**settings, **fields})


def test_it_loses_less(tiny_model: Path, tmp_path: Path) -> None:
    """A trained model goes on, with rounding and without, and both are rounded."""
    begun = train(configuration(tiny_model, tmp_path, rounding=RoundingConfig(), epochs=15))
    losses = {}
    slow = OptimizerConfig(name="adamw", learning_rate=3e-4)
    for name, rounding in (("aware", RoundingConfig(bits=4, group=16)), ("plain", RoundingConfig())):
        folder = tmp_path / name
        folder.mkdir()
        config = configuration(Path(str(begun.path)), folder, rounding=rounding, optimizer=slow)
        done = train(config)
        quantize(Path(str(done.path)), folder / "int4", QuantizeConfig(bits=4, group=16), accept=True)
        found = evaluate(folder / "int4", folder / "rows.jsonl", FormatConfig())
        assert isinstance(found, Likelihood)
        losses[name] = found.loss
    assert losses["aware"] < losses["plain"]
    trained = weights.load(tmp_path / "aware" / "run" / "last", torch.float32)
    small = weights.load(tmp_path / "aware" / "int4", torch.float32)
    for path, layer in small.model.layers.named_modules():
        if isinstance(layer, QuantizedLinear):
            scale = layer.weight_scale.float().repeat_interleave(16, 1)
            found_here = layer.values().float() * scale
            expected = trained.model.layers.get_submodule(path).weight
            assert float((found_here - expected).norm() / expected.norm()) < 0.01, path


def test_an_interrupted_run_ends_the_same(tiny_model: Path, tmp_path: Path) -> None:
    ends_the_same(tmp_path, lambda folder: configuration(tiny_model, folder, epochs=2, checkpoint_every=2), [3])


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"method": "lora"}, "rounding is for all weights of a decoder"),
        ({"rounding": RoundingConfig(group=16)}, r"means nothing without rounding\.bits"),
        ({"rounding": RoundingConfig(bits=4, group=24)}, "group 24 does not divide the 64 inputs"),
    ],
)
def test_what_means_nothing(tiny_model: Path, tmp_path: Path, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(configuration(tiny_model, tmp_path, **fields))
