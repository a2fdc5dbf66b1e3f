"""What was certified is what an engine computes: the golden prompts again at every start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steelyard.checkpoint import manifest
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.errors import CheckpointError
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.fidelity import MOST, recheck
from steelyard.infer.runner import PlanRunner
from steelyard.infer.worker import start
from steelyard.stages.compress import quantize

CONFIGS = {
    "int8": QuantizeConfig(),
    "int8-groups": QuantizeConfig(group=16),
    "int8-some-groups": QuantizeConfig(group=16, group_layers=("*.down_proj", "*.[qkv]_proj")),
    "int4": QuantizeConfig(bits=4, group=16),
    "mixed": QuantizeConfig(bits=4, group=16, int8_layers=("*.v_proj", "*.up_proj", "*.0.mlp.down_proj")),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("kv_cache", ["bfloat16", "int8"])
def test_what_was_certified_is_found(tiny_model: Path, tmp_path: Path, kind: str, kv_cache: Any) -> None:
    quantize(tiny_model, tmp_path / "small", CONFIGS[kind], accept=True)
    known: Any = manifest.read(tmp_path / "small").certificate
    assert [len(each["tokens"]) - len(each["nats"]) for each in known["golden"]] == [1, 1, 1, 1]
    engine = Engine.load(tmp_path / "small", config=EngineConfig(kv_cache=kv_cache))
    assert isinstance(engine.runner, PlanRunner), "whatever layers are joined in it"
    mean = recheck(engine, tmp_path / "small")
    assert mean is not None
    assert mean < MOST / 5
    assert not engine.busy


def test_a_broken_model_is_not_served(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "small", accept=True)
    path = tmp_path / "small" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name] = tensors[name] * torch.where(torch.arange(len(tensors[name])) % 2 == 0, 3.0, 1.0)[:, None].bfloat16()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"is not what was certified: its golden prompts are off by"):
        start(tmp_path / "small", {})


def test_a_model_without_a_certificate(tiny_model: Path) -> None:
    assert recheck(Engine.load(tiny_model), tiny_model) is None


@pytest.mark.parametrize(
    "golden",
    [
        3,
        [3],
        [{"tokens": [1, 2], "nats": [0.1, 0.2]}],
        [{"tokens": [1, 2], "nats": []}],
        [{"tokens": "a", "nats": []}],
        [{"nats": [1.0]}],
    ],
)
def test_a_certificate_that_is_none(tiny_model: Path, tmp_path: Path, golden: Any) -> None:
    quantize(tiny_model, tmp_path / "small", accept=True)
    known = manifest.read(tmp_path / "small")
    assert known.certificate is not None
    known.certificate["golden"] = golden
    manifest.write(tmp_path / "small", known)
    with pytest.raises(CheckpointError, match="has golden prompts"):
        recheck(Engine.load(tmp_path / "small"), tmp_path / "small")
