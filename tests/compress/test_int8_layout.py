"""int8 checkpoints: what is stored, what reads it back, and what other readers make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import make
from steelyard.compress.quantize import grid, layout
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.errors import CheckpointError
from steelyard.models import weights
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.linear import QuantizedEmbedding, QuantizedLinear


def logits(decoder: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        length = len(token_ids)
        return decoder.logits(decoder(token_ids, torch.arange(length), PackedAttention([length]))).float()


def quantised(tmp_path: Path, family: str, portable: bool = False) -> tuple[Decoder, Path]:
    """The dense model in float32 and the folder of its int8 form."""
    make(tmp_path / "base", family)
    (tmp_path / "int8").mkdir()
    dense = weights.load(tmp_path / "base", torch.float32)
    layout.write(dense, tmp_path / "int8", tmp_path / "base", QuantizeConfig(portable=portable))
    return dense, tmp_path / "int8"


@pytest.mark.parametrize("family", ["smollm", "llama2", "llama-biases", "qwen2", "qwen3", "mistral", "gemma3"])
def test_what_is_read_back_is_what_was_rounded(tmp_path: Path, family: str) -> None:
    dense, folder = quantised(tmp_path, family)
    small = weights.load(folder, torch.float32)
    assert isinstance(small.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(small.lm_head, QuantizedLinear)
    tied = dense.config.tied
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    stored = weights.read_tensors(folder)
    assert ("lm_head.weight" in stored) != tied, "a tied head is stored once"
    layers = 0
    for name, layer in dense.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            weight, scale = grid.rounded(layer.weight, 8, None)
            found = small.get_submodule(name)
            assert torch.equal(found.weight, weight), name
            assert torch.equal(found.weight_scale, scale), name
            layers += 1
    assert layers == 2 + 7 * dense.config.layers
    token_ids = torch.randint(97, (40,))
    before, after = logits(dense, token_ids), logits(small, token_ids)
    assert float((after - before).norm() / before.norm()) < 0.08  # 1 to 5% measured on these narrow models


@pytest.mark.parametrize("family", ["smollm", "llama2", "llama-biases", "qwen3"])
def test_transformers_opens_the_portable_form(tmp_path: Path, family: str) -> None:
    _, folder = quantised(tmp_path, family, portable=True)
    small = weights.load(folder, torch.float32)
    assert isinstance(small.model.embed_tokens, torch.nn.Embedding)
    assert isinstance(small.lm_head, torch.nn.Linear)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = torch.randint(97, (40,))
    with torch.no_grad():
        expected = theirs(token_ids[None]).logits[0].float()
    ours = logits(small, token_ids)
    # Theirs rounds activations in fake-quantised float: the same weights, other roundings of activations.
    assert float((ours - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("portable", [False, True])
def test_a_quantised_model_is_not_quantised_again(tmp_path: Path, portable: bool) -> None:
    _, folder = quantised(tmp_path, "smollm", portable)
    (tmp_path / "again").mkdir()
    with pytest.raises(CheckpointError, match="quantised already; start from its parent"):
        layout.write(weights.load(folder), tmp_path / "again", folder)
    assert list((tmp_path / "again").iterdir()) == []


def test_bytes_are_half(tmp_path: Path) -> None:
    make(tmp_path / "base", "smollm")
    (tmp_path / "int8").mkdir()
    dense = weights.load(tmp_path / "base")
    layout.write(dense, tmp_path / "int8", tmp_path / "base")
    tensors = weights.read_tensors(tmp_path / "int8")
    weight_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if tensor.dtype == torch.int8)
    matrices = {id(p): p.numel() for p in dense.parameters() if p.ndim == 2}
    assert weight_bytes == sum(matrices.values()), "one byte a weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"quant_method": "gptq"}, "quantisation 'gptq' is not known here"),
        ({"config_groups": None}, "only int8 and int4 weights"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 2, "type": "int"}}}}, "only int8"),
        (
            {
                "config_groups": {
                    "g": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
                        "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
                    }
                }
            },
            "only int8 activations",
        ),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    _, folder = quantised(tmp_path, "smollm")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=complaint):
        weights.load(folder)
