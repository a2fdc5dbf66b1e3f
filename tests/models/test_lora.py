"""Adapters against peft: the same outputs, files that go both ways, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from families import make
from steelyard.compress.quantize import layout
from steelyard.errors import CheckpointError, ConfigError
from steelyard.models import lora, weights
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter, AdapterRows

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def logits(decoder: Decoder, token_ids: torch.Tensor, adapter: Adapter | AdapterRows | None) -> torch.Tensor:
    with torch.no_grad():
        length = len(token_ids)
        return decoder.logits(decoder(token_ids, torch.arange(length), PackedAttention([length]), adapter))


def random_adapter(decoder: Decoder, rank: int, alpha: float, targets: tuple[str, ...] = ALL, seed: int = 1) -> Adapter:
    """An adapter whose B is not zero: it changes what the model says."""
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter.create(decoder, rank=rank, alpha=alpha, targets=targets, generator=generator)
    for _, b in adapter.pairs.values():
        b.normal_(0, 0.2, generator=generator)
    return adapter


def save(adapter: Adapter, folder: Path, base: Path) -> Path:
    folder.mkdir()
    adapter.save(folder, str(base))
    return folder


@pytest.mark.parametrize("family", ["smollm", "llama-biases", "qwen3", "gemma3"])
@pytest.mark.parametrize(("rank", "targets"), [(4, ALL), (1, ("q_proj", "v_proj")), (40, ("down_proj",))])
def test_peft_reads_what_we_write(tmp_path: Path, family: str, rank: int, targets: tuple[str, ...]) -> None:
    reference = make(tmp_path / "base", family)
    decoder = weights.load(tmp_path / "base", torch.float32)
    adapter = random_adapter(decoder, rank, 6.0, targets)
    token_ids = torch.randint(97, (30,))
    plain, tuned = logits(decoder, token_ids, None), logits(decoder, token_ids, adapter)
    assert float((tuned - plain).abs().max()) > 0.01
    theirs = PeftModel.from_pretrained(reference, save(adapter, tmp_path / "adapter", tmp_path / "base")).eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned, theirs(token_ids[None]).logits[0], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["smollm", "mistral", "gemma3"])
def test_we_read_what_peft_writes(tmp_path: Path, family: str) -> None:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=list(ALL), task_type="CAUSAL_LM", lora_dropout=0.1)
    reference = get_peft_model(make(tmp_path / "base", family), config).eval()
    for name, parameter in reference.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    reference.save_pretrained(tmp_path / "adapter")
    decoder = weights.load(tmp_path / "base", torch.float32)
    token_ids = torch.randint(97, (30,))
    with torch.no_grad():
        expected = reference(token_ids[None]).logits[0]
    adapter = Adapter.load(tmp_path / "adapter", decoder)
    torch.testing.assert_close(logits(decoder, token_ids, adapter), expected, atol=5e-5, rtol=1e-4)


def test_a_fresh_adapter_changes_nothing_and_the_seed_decides_it(tmp_path: Path) -> None:
    make(tmp_path, "smollm")
    decoder = weights.load(tmp_path, torch.float32)
    first, again, other = (
        Adapter.create(decoder, rank=4, alpha=8, targets=ALL, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    token_ids = torch.randint(97, (12,))
    assert torch.equal(logits(decoder, token_ids, first), logits(decoder, token_ids, None))
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    a, changed = first.pairs["model.layers.0.mlp.up_proj"][0], other.pairs["model.layers.0.mlp.up_proj"][0]
    assert not torch.equal(a, changed)
    bound = 1 / a.shape[1] ** 0.5
    assert 0.9 * bound < float(a.abs().max()) <= bound


def test_merging_equals_wearing(tmp_path: Path) -> None:
    make(tmp_path / "base", "qwen2")
    decoder = weights.load(tmp_path / "base", torch.float32)
    adapter = random_adapter(decoder, 4, 8.0)
    token_ids = torch.randint(97, (30,))
    worn = logits(decoder, token_ids, adapter)
    files = {path: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    lora.merge(decoder, adapter)
    torch.testing.assert_close(logits(decoder, token_ids, None), worn, atol=1e-4, rtol=1e-4)
    assert {path: path.read_bytes() for path in files} == files, "weights are mapped: the file must not change"


def test_merging_rounds_once(tmp_path: Path) -> None:
    """bfloat16 weights: what is stored is the nearest to the sum taken in float64, or its neighbour by a tie."""
    make(tmp_path, "smollm")
    decoder = weights.load(tmp_path, torch.bfloat16)
    adapter = random_adapter(decoder, 8, 16.0)
    name = "model.layers.1.self_attn.q_proj"
    a, b = adapter.pairs[name]
    exact = decoder.get_submodule(name).weight.double() + 2.0 * (b.double() @ a.double())
    lora.merge(decoder, adapter)
    error = (decoder.get_submodule(name).weight.double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())


def test_rows_wear_their_own_adapters(tmp_path: Path) -> None:
    make(tmp_path, "smollm")
    decoder = weights.load(tmp_path, torch.float32)
    adapters = [random_adapter(decoder, 4, 8.0, seed=1), random_adapter(decoder, 16, 4.0, ("q_proj",), seed=2), None]
    lengths = [7, 1, 12, 5, 9]
    worn = [adapters[place] for place in (1, 0, 2, 0, 1)]
    rows = [torch.randint(97, (length,)) for length in lengths]
    places: dict[int, list[int]] = {0: [], 1: []}
    start = 0
    for length, place in zip(lengths, (1, 0, 2, 0, 1), strict=True):
        if place in places:
            places[place] += range(start, start + length)
        start += length
    together = AdapterRows(
        (adapter, torch.tensor(places[place])) for place, adapter in enumerate(adapters) if adapter is not None
    )
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        found = decoder.logits(decoder(torch.cat(rows), positions, PackedAttention(lengths), together))
    expected = torch.cat([logits(decoder, row, adapter) for row, adapter in zip(rows, worn, strict=True)])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_dropout_only_while_training(tmp_path: Path) -> None:
    make(tmp_path, "smollm")
    decoder = weights.load(tmp_path, torch.float32)
    adapter = random_adapter(decoder, 4, 8.0)
    adapter.dropout = 0.5
    token_ids = torch.randint(97, (12,))
    still = logits(decoder, token_ids, adapter)
    assert torch.equal(logits(decoder, token_ids, adapter), still)
    adapter.training = True
    assert not torch.equal(logits(decoder, token_ids, adapter), still)


def test_a_layer_that_is_none_is_named(tmp_path: Path) -> None:
    make(tmp_path, "smollm")
    decoder = weights.load(tmp_path, torch.float32)
    with pytest.raises(ConfigError, match="no layer called 'qproj' can have an adapter; this model has: down_proj"):
        Adapter.create(decoder, rank=4, alpha=8, targets=("qproj",))


def test_a_quantised_base_wears_but_does_not_merge(tmp_path: Path) -> None:
    make(tmp_path / "base", "smollm")
    dense = weights.load(tmp_path / "base")
    (tmp_path / "int8").mkdir()
    layout.write(dense, tmp_path / "int8", tmp_path / "base")
    small = weights.load(tmp_path / "int8")
    adapter = Adapter.load(save(random_adapter(dense, 4, 8.0), tmp_path / "adapter", tmp_path / "base"), small)
    token_ids = torch.randint(97, (12,))
    assert not torch.equal(logits(small, token_ids, adapter), logits(small, token_ids, None))
    with pytest.raises(CheckpointError, match="merge the adapter into the model before quantising it"):
        lora.merge(small, adapter)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("fields", "tensors", "complaint"),
    [
        ({"use_dora": True}, {}, "use_dora = True is not known here"),
        ({"use_rslora": True}, {}, "use_rslora"),
        ({"bias": "all"}, {}, "bias = 'all'"),
        ({"peft_type": "IA3"}, {}, "peft_type = 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, {}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights = 'pissa'"),
        ({"lora_alpha": "8"}, {}, "lora_alpha must be a number"),
        ({"lora_alpha": True}, {}, "lora_alpha must be a number"),
        ({}, {f"{LAYER}.lora_A.weight": None}, "lacks its A or B"),
        ({}, {f"{LAYER}.lora_A.weight": torch.ones(4, 47)}, "this adapter belongs to another model"),
        ({}, {f"{LAYER}.lora_A.weight": torch.ones(5, 48)}, "this adapter belongs to another model"),
        ({}, {f"{LAYER}.lora_B.weight": torch.ones(48)}, "no pair of matrices"),
        ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 48)}, "is no layer of"),
        ({}, {f"{LAYER}.lora_embedding_A": torch.ones(4, 48)}, "is not known here|is no layer"),
        ({}, {f"{LAYER}.lora_magnitude_vector": torch.ones(48)}, "is not known here|is no layer"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, torch.Tensor | None], complaint: str
) -> None:
    make(tmp_path / "base", "smollm")
    decoder = weights.load(tmp_path / "base", torch.float32)
    folder = save(random_adapter(decoder, 4, 8.0), tmp_path / "adapter", tmp_path / "base")
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stored = safetensors.torch.load_file(folder / lora.WEIGHTS) | tensors
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    safetensors.torch.save_file(kept, folder / lora.WEIGHTS)
    with pytest.raises(CheckpointError, match=complaint):
        Adapter.load(folder, decoder)


def test_files_that_are_none(tmp_path: Path) -> None:
    make(tmp_path / "base", "smollm")
    decoder = weights.load(tmp_path / "base", torch.float32)
    with pytest.raises(CheckpointError, match="is a model, not an adapter"):
        Adapter.load(tmp_path / "base", decoder)
    folder = save(random_adapter(decoder, 4, 8.0), tmp_path / "adapter", tmp_path / "base")
    whole = (folder / lora.WEIGHTS).read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"\x80\x04pickle"):
        (folder / lora.WEIGHTS).write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            Adapter.load(folder, decoder)
    safetensors.torch.save_file({}, folder / lora.WEIGHTS)
    with pytest.raises(CheckpointError, match="holds no weights"):
        Adapter.load(folder, decoder)
