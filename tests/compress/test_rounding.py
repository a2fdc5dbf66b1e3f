"""Rounding to integers: what it costs, against plain references in float64, and what others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from families import make
from steelyard.compress.quantize import awq, gptq, grid, layout
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.compress.quantize.grid import Integers
from steelyard.data.packing import Pack, pack
from steelyard.data.rows import TokenRow
from steelyard.models import weights
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.linear import QuantizedLinear, packed_halves, unpacked_halves


def logits(decoder: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        length = len(token_ids)
        return decoder.logits(decoder(token_ids, torch.arange(length), PackedAttention([length]))).float()


def batches() -> list[Pack]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(97, (length,), generator=draw).tolist() for length in (30, 40, 60)]
    return [pack([TokenRow(tokens=row, trained=[True] * len(row)) for row in rows])]


@given(rows=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 1000))
def test_four_bits_packed_and_back(rows: int, groups: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randint(-8, 8, (rows, 8 * groups), dtype=torch.int8, generator=draw)
    packed = packed_halves(weight)
    assert packed.shape == (rows, groups)
    assert torch.equal(unpacked_halves(packed), weight)
    for place in range(8):
        assert torch.equal((packed >> 4 * place) & 15, weight[:, place::8].int() + 8)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 16, 64])
def test_each_weight_is_the_nearest(bits: int, group: int | None) -> None:
    weight = torch.randn(9, 64) * torch.rand(9, 1)
    weight[3, 16:32] = 0
    found = grid.rounded(weight, bits, group)
    assert found.values.dtype == torch.int8
    assert found.scale.shape == (9, 64 // (group or 64))
    scale = found.scale.double().repeat_interleave(group or 64, 1)
    lowest, largest = (-127, 127) if bits == 8 else (-8, 7)
    steps = (weight.double() / scale).clamp(lowest, largest)
    assert bool(((found.values.double() - steps).abs() <= 0.5 + 1e-6).all())
    torch.testing.assert_close(found.restored().double(), found.values.double() * scale)


def test_a_searched_scale_loses_less_and_heeds_what_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=draw)
    plain, searched = (grid.rounded(weight, 4, 64, factors=factors).restored() for factors in ((1.0,), grid.SHRINK))
    assert float((searched - weight).norm()) < float((plain - weight).norm())
    importance = torch.where(torch.arange(128) % 2 == 0, 100.0, 1.0)
    heeded = grid.rounded(weight, 4, 64, importance).restored()
    errors = [float(((found - weight).square() * importance).sum()) for found in (heeded, searched)]
    assert errors[0] < errors[1]


def obq(weight: torch.Tensor, gram: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Optimal brain quantisation in a fixed order, with the inverse of what is left taken anew at each column."""
    left = weight.double().clone()
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    out = torch.zeros_like(left)
    for column in range(left.shape[1]):
        if column % group == 0:
            few = slice(column, column + group)
            scale = grid.scales(left[:, few], bits, None, gram.diagonal()[few])
        inverse = torch.linalg.inv(damped[column:, column:])
        whole = grid.to_grid(left[:, column : column + 1], scale, bits).double() * scale.double()
        out[:, column] = whole[:, 0]
        error = (left[:, column] - whole[:, 0]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [16, 48])
def test_gptq_is_obq_in_order(bits: int, group: int) -> None:
    draw = torch.Generator().manual_seed(group)
    x = torch.randn(400, 192, generator=draw, dtype=torch.float64) @ torch.randn(192, 192, generator=draw).double()
    weight, gram = torch.randn(12, 192, generator=draw), x.T @ x
    expected = obq(weight, gram, bits, group)
    found = gptq.rounded(weight, gram, bits, group)
    # A weight halfway between two integers may fall to either side.
    same = (found.restored().double() - expected).abs() < 1e-6
    assert float(same.double().mean()) > 0.98

    def lost(what: torch.Tensor) -> float:
        change = what.double() - weight.double()
        return float(((change @ gram) * change).sum())

    assert lost(found.restored()) == pytest.approx(lost(expected), rel=0.05)
    assert lost(found.restored()) < 0.7 * lost(grid.rounded(weight, bits, group).restored())


def test_awq_chooses_what_changes_outputs_least() -> None:
    draw = torch.Generator().manual_seed(1)
    sizes = torch.ones(64)
    sizes[5], sizes[40] = 50.0, 20.0
    x = torch.randn(300, 64, generator=draw) * sizes
    layer = torch.nn.Linear(64, 24, bias=False)
    rule = awq.Awq(4, 32)
    seen = rule.record(layer)
    seen.add(x[:100])
    seen.add(x[100:].view(2, 100, 64))

    def lost(scales: torch.Tensor) -> float:
        weight, importance = layer.weight.detach() * scales, x.square().sum(0) / scales.square()
        rounded = grid.rounded(weight, 4, 32, importance, awq.FACTORS).restored() / scales
        return float((x.double() @ (rounded - layer.weight.detach()).double().T).square().sum())

    found = rule.scales(seen, [layer])
    assert torch.equal(found, found.log2().round().exp2())
    magnitudes = x.abs().mean(0).log2()
    tried = [lost((strength * (magnitudes - magnitudes.mean())).round().exp2()) for strength in awq.STRENGTHS]
    assert lost(found) == pytest.approx(min(tried), rel=1e-3)
    assert lost(found) < 0.8 * lost(torch.ones(64))


@pytest.mark.parametrize("method", ["nearest", "awq", "gptq"])
def test_methods_on_a_model(tmp_path: Path, method: Any) -> None:
    make(tmp_path / "base", "smollm")
    dense = weights.load(tmp_path / "base", torch.float32)
    token_ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(3))
    before = logits(dense, token_ids)
    (tmp_path / "int4").mkdir()
    given_ = batches() if method != "nearest" else []
    layout.write(dense, tmp_path / "int4", tmp_path / "base", QuantizeConfig(bits=4, group=16, method=method), given_)
    after = logits(weights.load(tmp_path / "int4", torch.float32), token_ids)
    assert float((after - before).norm() / before.norm()) < 0.3
    stored = weights.read_tensors(tmp_path / "int4")
    assert stored["model.layers.0.mlp.down_proj.weight_packed"].dtype == torch.int32
    assert stored["model.embed_tokens.weight"].dtype == torch.int8


@pytest.mark.parametrize("family", ["smollm", "llama2", "llama-biases", "qwen2", "gemma3"])
def test_transformers_opens_the_portable_form(tmp_path: Path, family: str) -> None:
    make(tmp_path / "base", family)
    dense = weights.load(tmp_path / "base", torch.float32)
    (tmp_path / "int4").mkdir()
    layout.write(dense, tmp_path / "int4", tmp_path / "base", QuantizeConfig(bits=4, group=16, portable=True))
    small = weights.load(tmp_path / "int4", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32).eval()
    token_ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(token_ids[None]).logits[0].float()
    found = logits(small, token_ids)
    # Theirs leaves activations as they are, ours rounds them to bytes.
    assert float((found - expected).norm() / expected.norm()) < 0.02
    for layer in small.modules():
        if hasattr(layer, "bits"):
            assert layer.bits == 4


def test_some_layers_alone_have_groups(tmp_path: Path) -> None:
    make(tmp_path / "base", "smollm")
    dense = weights.load(tmp_path / "base", torch.float32)
    config = QuantizeConfig(group=16, group_layers=("*.down_proj", "*.0.self_attn.[qkv]_proj"))
    (tmp_path / "some").mkdir()
    layout.write(dense, tmp_path / "some", tmp_path / "base", config)
    small = weights.load(tmp_path / "some", torch.float32)
    for path, layer in small.named_modules():
        if isinstance(layer, QuantizedLinear):
            grouped = path.endswith("down_proj") or (".0.self_attn" in path and not path.endswith("o_proj"))
            assert layer.bits == 8
            assert layer.weight_scale.shape[1] == (layer.in_features // 16 if grouped else 1), path
    schemes = json.loads((tmp_path / "some" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert schemes["group_0"]["weights"]["strategy"] == "channel"
    assert schemes["group_3"]["weights"]["group_size"] == 16
    assert "model.layers.0.self_attn.q_proj" in schemes["group_3"]["targets"]
    token_ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(3))
    expected = logits(dense, token_ids)
    assert float((logits(small, token_ids) - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("portable", [False, True])
def test_some_layers_keep_eight_bits(tmp_path: Path, portable: bool) -> None:
    make(tmp_path / "base", "smollm")
    dense = weights.load(tmp_path / "base", torch.float32)
    also = "model.layers.0.self_attn.o_proj"
    config = QuantizeConfig(bits=4, group=16, int8_layers=("*.down_proj", also), portable=portable)
    (tmp_path / "mixed").mkdir()
    layout.write(dense, tmp_path / "mixed", tmp_path / "base", config)
    small = weights.load(tmp_path / "mixed", torch.float32)
    for path, layer in small.named_modules():
        if isinstance(layer, QuantizedLinear) and path != "lm_head":
            eight = path.endswith("down_proj") or path == also
            assert layer.bits == (8 if eight else 4), path
            assert layer.weight_scale.shape[1] == (1 if eight and portable else layer.in_features // 16), path
            lost = Integers(layer.values(), layer.weight_scale).restored() - dense.get_submodule(path).weight
            assert (float(lost.norm() / dense.get_submodule(path).weight.norm()) < 0.02) == eight, path
    token_ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(3))
    if portable:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed", dtype=torch.float32).eval()
        with torch.no_grad():
            expected = theirs(token_ids[None]).logits[0].float()
        assert float((logits(small, token_ids) - expected).norm() / expected.norm()) < 0.02
