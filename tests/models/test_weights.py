"""Checkpoint folders into models and back: several files, old buffers, tied heads, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import make
from steelyard.errors import CheckpointError
from steelyard.models import weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "model", "llama2")
    return tmp_path / "model"


def rewrite(folder: Path, **changed: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = {**load_file(folder / weights.WEIGHTS), **changed}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / weights.WEIGHTS, metadata={"format": "pt"})


def test_several_files_are_one_model(folder: Path, tmp_path: Path) -> None:
    split = tmp_path / "split"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(split, max_shard_size="40KB")
    assert len(list(split.glob("model-*.safetensors"))) > 1
    whole, pieces = weights.load(folder, torch.float32), weights.load(split, torch.float32)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, pieces.get_parameter(name)), name


@pytest.mark.parametrize("family", ["llama2", "smollm", "llama-biases", "qwen3"])
def test_what_is_saved_opens_again_here_and_in_transformers(tmp_path: Path, family: str) -> None:
    make(tmp_path / "model", family)
    decoder = weights.load(tmp_path / "model", torch.float32)
    for parameter in decoder.parameters():
        parameter.mul_(1.5)
    (tmp_path / "copy").mkdir()
    weights.save(decoder, tmp_path / "copy", tmp_path / "model")
    again = weights.load(tmp_path / "copy", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == decoder.config.tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_wanted_dtype(folder: Path, dtype: torch.dtype) -> None:
    stored = load_file(folder / weights.WEIGHTS)
    for name, parameter in weights.load(folder, dtype).named_parameters():
        assert torch.equal(parameter, stored[name].to(dtype)), name


def test_a_tied_head_that_is_stored_gives_way(tmp_path: Path) -> None:
    make(tmp_path, "smollm")
    rewrite(tmp_path, **{"lm_head.weight": torch.zeros(97, 48)})
    decoder = weights.load(tmp_path, torch.float32)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert bool(decoder.lm_head.weight.any())


def test_buffers_of_old_files_are_left_out(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    weights.load(folder)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"model.norm.weight": None}, r"lacks 'model\.norm\.weight'"),
        ({"lm_head.weight": None}, r"lacks 'lm_head\.weight'"),
        ({"model.layers.0.extra": torch.zeros(1)}, r"unknown 'model\.layers\.0\.extra'"),
        ({"model.norm.weight": torch.ones(47)}, r"'model\.norm\.weight' is \(47,\), config\.json says \(48,\)"),
        ({"model.norm.weight": torch.ones(48, dtype=torch.int8)}, "is int8 without a scale per output channel"),
        ({"lm_head.weight": torch.ones(97, 48, dtype=torch.int8)}, "int8 without a scale|int8|quanti"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, changed: dict[str, Any], complaint: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if any(tensor is not None and tensor.dtype == torch.int8 for tensor in changed.values()):
        scheme = {"num_bits": 8, "type": "int", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**scheme, "strategy": "channel"},
            "input_activations": {**scheme, "strategy": "token", "dynamic": True},
        }
        config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"a": group}}
        (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, **changed)
    with pytest.raises(CheckpointError, match=complaint):
        weights.load(folder)


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    shutil.copytree(folder, empty)
    (empty / weights.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors: the checkpoint is incomplete"):
        weights.load(empty)
    (empty / weights.WEIGHTS).write_bytes((folder / weights.WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights.load(empty)
    config = json.loads((folder / "config.json").read_text())
    (empty / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(CheckpointError, match="'MambaForCausalLM' is not known here; known: LlamaForCausalLM"):
        weights.load(empty)
