"""What moves from activations into weights: the model says the same, to the bit, and int8 loses less."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make
from steelyard.compress.inputs import Magnitudes
from steelyard.compress.quantize import layout
from steelyard.compress.quantize.decoders import EMBEDDING, QuantizeConfig, quantize
from steelyard.compress.quantize.smoothing import Balance, Smoothed
from steelyard.compress.quantize.smoothing import smooth as smooth_by
from steelyard.data.packing import Pack, pack
from steelyard.data.rows import TokenRow
from steelyard.errors import CheckpointError, ConfigError
from steelyard.models import quantized, smoothing, weights
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Block, Decoder
from steelyard.models.lora import Adapter

FAMILIES = ["smollm", "llama2", "llama-biases", "qwen3", "mistral"]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def batches(seed: int = 0) -> list[Pack]:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(97, (length,), generator=draw).tolist() for length in (9, 30, 1, 17, 40)]
    return [pack([TokenRow(tokens=row, trained=[True] * len(row)) for row in part]) for part in (rows[:2], rows[2:])]


def smooth(decoder: Decoder, given: list[Pack], strength: float, *, head: bool) -> Smoothed:
    return smooth_by(decoder, given, Balance([batch.lengths for batch in given], strength), head=head)


def states(decoder: Decoder, adapter: Adapter | None = None) -> torch.Tensor:
    """Before the head, of tokens that no calibration saw."""
    token_ids = torch.randint(97, (50,), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return decoder(token_ids, torch.arange(50), PackedAttention([50]), adapter)


def dense(folder: Path, family: str) -> Decoder:
    """With channels that are much larger than others, as large models have them."""
    make(folder / "base", family)
    decoder = weights.load(folder / "base", torch.float32)
    for block in decoder.model.layers:
        assert isinstance(block, Block)
        block.input_layernorm.weight[3] *= 60
        block.post_attention_layernorm.weight[3] *= 60
        block.mlp.up_proj.weight[5] *= 60
    decoder.model.norm.weight[3] *= 60
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_says_the_same_to_the_bit(tmp_path: Path, family: str) -> None:
    decoder = dense(tmp_path, family)
    smoothed = copy.deepcopy(decoder)
    moved = smooth(smoothed, batches(), 0.5, head=False)
    assert len(moved.scales) == 3 * decoder.config.layers
    assert moved.columns is None
    assert all(torch.equal(scale.log2(), scale.log2().round()) for scale in moved.scales.values())
    assert any(scale.max() >= 4 for scale in moved.scales.values())
    assert torch.equal(states(smoothed), states(decoder))


@pytest.mark.parametrize("family", ["smollm", "llama2"])
def test_a_smoothed_head_says_the_same_too(tmp_path: Path, family: str) -> None:
    decoder = dense(tmp_path, family)
    smoothed = copy.deepcopy(decoder)
    moved = smooth(smoothed, batches(), 0.5, head=True)
    assert (moved.columns is not None) == decoder.config.tied
    head = smoothed.lm_head.weight
    if moved.columns is not None:
        restored = smoothed.model.embed_tokens.weight * moved.columns
        assert torch.equal(restored, decoder.model.embed_tokens.weight)
        smoothed.model.embed_tokens.weight = torch.nn.Parameter(restored)
    assert torch.equal(states(smoothed) @ head.T, decoder.logits(states(decoder)))


def test_the_scales_are_those_of_the_paper(tmp_path: Path) -> None:
    """Equation 4 in float64, from what a hook of PyTorch's own sees, to the nearest power of two."""
    decoder = dense(tmp_path, "llama2")
    block = decoder.model.layers[1]
    assert isinstance(block, Block)
    seen: list[torch.Tensor] = []
    handle = block.mlp.gate_proj.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].double()))
    given = batches()
    with torch.no_grad():
        for batch in given:
            decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths))
    handle.remove()
    rows = [row.abs().amax(0) for x, batch in zip(seen, given, strict=True) for row in x.split(batch.lengths)]
    typical = torch.stack(rows).median(0).values
    columns = torch.cat([block.mlp.gate_proj.weight, block.mlp.up_proj.weight]).double().abs().amax(0)
    expected = typical**0.7 / columns**0.3
    expected = expected / expected.log().mean().exp()
    found = smooth(decoder, given, 0.7, head=False).scales["model.layers.1.post_attention_layernorm"]
    assert bool(((found.double() / expected).log2().abs() <= 0.5001).all())


def test_norms_that_add_to_their_weights_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "base", "gemma3")
    decoder = weights.load(tmp_path / "base", torch.float32)
    assert QuantizeConfig.chosen(8, None, None, rows=True, smooth=False).method == "gptq"
    for method in ("smoothquant", "awq"):
        with pytest.raises(ConfigError, match="gemma3_text add 1 to their weights: take gptq, or nearest"):
            quantize(decoder, QuantizeConfig(method=method), batches())  # type: ignore[arg-type]


def test_an_odd_token_does_not_count() -> None:
    rows = torch.rand(20, 4)
    rows[7, 2] = 1e6
    record = Magnitudes([[5, 5], [5, 5]])
    record.add(rows[:10])
    record.add(rows[10:])
    assert bool((record.typical() <= 1).all())


@pytest.mark.parametrize("family", ["smollm", "llama2", "llama-biases", "qwen3"])
@pytest.mark.parametrize("portable", [False, True])
def test_int8_loses_less(tmp_path: Path, family: str, portable: bool) -> None:
    decoder = dense(tmp_path, family)
    expected = decoder.logits(states(decoder))
    lost = []
    for way in ("plain", "smoothed"):
        folder = tmp_path / way
        folder.mkdir()
        method, given = ("nearest", []) if way == "plain" else ("smoothquant", batches())
        layout.write(decoder, folder, tmp_path / "base", QuantizeConfig(method=method, portable=portable), given)  # type: ignore[arg-type]
        small = weights.load(folder, torch.float32)
        assert bool(given) == bool(small.smoothing)
        lost.append(float((small.logits(states(small)) - expected).norm() / expected.norm()))
    assert lost[1] < (0.6 if family in ("smollm", "qwen3") else 1) * lost[0], lost


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_the_model_before_fits(tmp_path: Path, family: str) -> None:
    decoder = dense(tmp_path, family)
    draw = torch.Generator().manual_seed(3)
    adapter = Adapter.create(decoder, rank=2, alpha=4.0, targets=LAYERS, generator=draw)
    for _, b in adapter.pairs.values():
        b.normal_(0, 0.1, generator=draw)
    (tmp_path / "adapter").mkdir()
    adapter.save(tmp_path / "adapter", str(tmp_path / "base"))
    smoothed = copy.deepcopy(decoder)
    smoothed.smoothing = smooth(smoothed, batches(), 0.5, head=False).scales
    found = states(smoothed, Adapter.load(tmp_path / "adapter", smoothed))
    assert torch.equal(found, states(decoder, adapter))
    assert not torch.equal(found, states(decoder))
    smoothed.smoothing = {}
    assert not torch.allclose(states(smoothed, Adapter.load(tmp_path / "adapter", smoothed)), found)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, value: float) -> None:
    folder, source = tmp_path / "small", dense(tmp_path, "smollm")
    folder.mkdir()
    layout.write(source, folder, tmp_path / "base", QuantizeConfig(method="smoothquant"), batches())
    assert weights.load(folder).smoothing
    good, path = load_file(folder / smoothing.FILE), folder / smoothing.FILE
    name = "model.layers.0.up_proj"
    for wrong in (torch.full((80,), value), torch.ones(79), torch.ones(1), torch.ones(80, 1)):
        save_file({**good, name: wrong}, path)
        with pytest.raises(CheckpointError, match=rf"'{name}' must be a vector of 80 numbers above 0"):
            weights.load(folder)
    save_file({other: scale for other, scale in good.items() if other != name}, path)
    with pytest.raises(CheckpointError, match=rf"lacks '{name}'"):
        weights.load(folder)
    for damaged in (b"\x00" * 20, None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            weights.load(folder)
    save_file(good, path)
    tensors = load_file(folder / weights.WEIGHTS)
    columns = f"{EMBEDDING}.{quantized.COLUMNS}"
    save_file({**tensors, columns: torch.full((48,), value)}, folder / weights.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"column_scale' must be a vector of 48 numbers above 0"):
        weights.load(folder)
