"""A decoder as GGUF: read again it has the same settings, the same weights to the bit of its type, the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants

import families
from steelyard.checkpoint import gguf_convert, manifest
from steelyard.checkpoint.gguf import GGUF
from steelyard.checkpoint.gguf_places import places, unpermute
from steelyard.compress.quantize import layout
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.errors import CheckpointError, ConfigError
from steelyard.evaluate.certificate import Thresholds
from steelyard.models import config as decoder_config
from steelyard.models import weights
from steelyard.models.attention import PackedAttention
from steelyard.models.config import rotary_frequencies
from steelyard.models.decoder import Decoder
from steelyard.models.linear import QuantizedEmbedding, QuantizedWeight
from steelyard.models.lora import Adapter
from steelyard.models.opening import open_checkpoint
from steelyard.stages import export
from steelyard.stages.compress import quantize
from steelyard.stages.export import Kind, gguf
from steelyard.stages.merge import merge
from steelyard.text.tokenizer import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TEXTS = (
    "The steelyard weighs exactly with one moving weight.",
    "Grüße aus München: 20 °C, ein Stück Käse für 3,50 €, naïve café.",
    "今天天气很好。 Привет, мир! 😀🚀 and so on",
)
LLAMA3 = {**families.LLAMA3, "original_max_position_embeddings": 8192}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Sizes that blocks of 32 divide."""


def made(folder: Path, tokenizer: Path, family: str = "smollm", **sizes: int) -> Path:
    rows = Tokenizer.load(tokenizer).vocabulary + 5
    families.make(folder, family, vocab_size=rows, **sizes).bfloat16().save_pretrained(folder)
    for name in FILES:
        shutil.copy(tokenizer / name, folder)
    return folder


def again(file: Path, folder: Path) -> Path:
    folder.mkdir()
    gguf_convert.convert(file, folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    opened = open_checkpoint(folder, torch.float32)
    ids = torch.tensor(opened.tokenizer.encode(TEXTS[0])[:5])  # no more than the smallest window
    with torch.inference_mode():
        states = opened.decoder(ids, torch.arange(len(ids)), PackedAttention([len(ids)]))
        return opened.decoder.logits(states)


def stored(file: Path, decoder: Decoder) -> dict[str, np.ndarray]:
    """The file's tensors by their names in the decoder, in its order of rows."""
    read = GGUF(file)
    names = places(_config(decoder))
    assert read.tensors.keys() - {"rope_freqs.weight"} == names.keys()
    found = {}
    for name, place in names.items():
        values = read.tensors[name].read()
        found[place.name] = unpermute(values, place.heads) if place.heads else values
    return found


def _config(decoder: Decoder) -> dict[str, Any]:
    config = decoder.config
    table = decoder.model.embed_tokens
    smoothed = isinstance(table, QuantizedEmbedding) and table.column_scale is not None
    return {
        "model_type": "llama" if config.model_type == "mistral" else config.model_type,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "attention_bias": config.output_bias,
        "tie_word_embeddings": config.tied and not smoothed,
    }


@pytest.mark.parametrize(
    "family", [name for name in families.FAMILIES if name != "llama-biases" and not name.startswith("gemma")]
)
def test_every_family_comes_back(
    tiny_tokenizer_folder: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, "llama3", ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e6}}))
    monkeypatch.setattr(export, "PIECE_VALUES", 1000)
    folder = made(tmp_path / "model", tiny_tokenizer_folder, family)
    told: list[tuple[int, int]] = []
    found = gguf(folder, tmp_path / "x.gguf", "bf16", lambda done, of: told.append((done, of)))
    assert told[-1][0] == told[-1][1]
    assert found.bytes == (tmp_path / "x.gguf").stat().st_size
    assert found.checkpoint == manifest.read(folder).id == GGUF(tmp_path / "x.gguf").metadata["steelyard.checkpoint"]
    back = again(tmp_path / "x.gguf", tmp_path / "back")
    assert torch.equal(logits(back), logits(folder))
    one, other = decoder_config.load(folder), decoder_config.load(back)
    for field in (
        "vocabulary",
        "width",
        "layers",
        "heads",
        "kv_heads",
        "head_width",
        "feed_forward",
        "tied",
        "qk_norm",
    ):
        assert getattr(one, field) == getattr(other, field), field
    assert other.norm_epsilon == one.norm_epsilon
    assert other.context == min([one.context, *filter(None, one.windows)])
    assert set(other.windows) == {None}
    for mine, others in zip(rotary_frequencies(one, one.rope), rotary_frequencies(other, other.rope), strict=True):
        assert torch.allclose(torch.as_tensor(mine), torch.as_tensor(others), rtol=1e-6)
    mine, others = Tokenizer.load(folder), Tokenizer.load(back)
    for text in TEXTS:
        assert others.encode(text, add_special_tokens=True) == mine.encode(text, add_special_tokens=True)
    opened = open_checkpoint(back)
    assert opened.template is not None
    assert "<|im_start|>" in opened.template.source


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_every_type_holds_what_it_says(tiny_tokenizer_folder: Path, tmp_path: Path, kind: Kind) -> None:
    folder = made(tmp_path / "model", tiny_tokenizer_folder, "llama2", **WIDE)
    found = gguf(folder, tmp_path / "x.gguf", kind)
    assert (found.kind, found.kept) == (kind, 0)
    decoder = open_checkpoint(folder).decoder
    tensors = stored(tmp_path / "x.gguf", decoder)
    for name, parameter in decoder.named_parameters():
        expected = parameter.float().numpy()
        if expected.ndim == 2:
            eight = kind == "q4_0" and name in ("model.embed_tokens.weight", "lm_head.weight")
            type_ = GGMLQuantizationType["Q8_0" if eight else kind.upper()]
            expected = quants.dequantize(quants.quantize(expected, type_), type_)
        np.testing.assert_array_equal(tensors[name], expected, err_msg=name)


def test_rows_that_no_block_divides_are_float16(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", tiny_tokenizer_folder, "llama2", intermediate_size=64)
    gguf(folder, tmp_path / "x.gguf", "q4_0")
    kinds = {name: tensor.type.name for name, tensor in GGUF(tmp_path / "x.gguf").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"


def expected(layer: QuantizedWeight, kind: str) -> np.ndarray:
    """What a layer of integers is in a file of a type, by the block format."""
    scales = layer.weight_scale.float()
    integers = layer.values().float().view(*scales.shape, -1)
    most = {"q8_0": 8, "q4_0": 4}.get(kind, 0)
    if layer.bits <= most and layer.group % 32 == 0:
        return (integers * scales.half().float()[..., None]).flatten(-2).numpy()
    type_ = GGMLQuantizationType[kind.upper()]
    return quants.dequantize(quants.quantize(layer.numbers().numpy(), type_), type_)


@pytest.mark.parametrize(
    ("bits", "group", "kind", "kept"),
    [
        (8, 32, "q8_0", 22),
        (8, None, "q8_0", 22),
        (8, 32, "q4_0", 1),
        (8, 16, "q8_0", 0),
        (4, 32, "q4_0", 22),
        (4, 32, "q8_0", 22),
        (4, 32, "f32", 0),
    ],
)
def test_integers_are_kept(
    tiny_tokenizer_folder: Path, tmp_path: Path, bits: Any, group: int | None, kind: Kind, kept: int
) -> None:
    folder = made(tmp_path / "model", tiny_tokenizer_folder, **WIDE)
    small = tmp_path / "small"
    small.mkdir()
    layout.write(open_checkpoint(folder).decoder, small, folder, QuantizeConfig(bits=bits, group=group))
    found = gguf(small, tmp_path / "x.gguf", kind)
    assert found.kept == kept
    decoder = open_checkpoint(small).decoder
    tensors = stored(tmp_path / "x.gguf", decoder)
    layers = {name: layer for name, layer in decoder.named_modules() if isinstance(layer, QuantizedWeight)}
    for name in layers.keys() - {"lm_head"}:  # which is the embedding
        eight = kind == "q4_0" and name.endswith("embed_tokens")
        values = expected(layers[name], "q8_0" if eight else kind)
        np.testing.assert_array_equal(tensors[f"{name}.weight"], values, err_msg=name)
    if kept and group is not None:  # scales are bfloat16, which float16 holds unless they are very small
        scales = torch.cat([layer.weight_scale.flatten() for layer in layers.values()]).float()
        assert torch.equal(scales.half().float(), scales)


def test_an_embedding_whose_head_is_smoothed_stands_beside_it(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", tiny_tokenizer_folder, **WIDE)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    config = QuantizeConfig(bits=8, group=32, method="smoothquant")
    quantize(folder, tmp_path / "small", config, data=rows, accept=True, thresholds=Thresholds(bits_per_byte=9))
    decoder = open_checkpoint(tmp_path / "small").decoder
    table, head = decoder.model.embed_tokens, decoder.lm_head
    assert isinstance(table, QuantizedEmbedding)
    assert table.column_scale is not None
    assert isinstance(head, QuantizedWeight)
    found = gguf(tmp_path / "small", tmp_path / "x.gguf")
    assert found.kept == 22
    tensors = stored(tmp_path / "x.gguf", decoder)
    np.testing.assert_array_equal(tensors["lm_head.weight"], expected(head, "q8_0"))
    near = table.numbers().numpy()
    assert np.abs(tensors["model.embed_tokens.weight"] - near).max() < np.abs(near).max() / 127


def test_an_adapter_is_merged_first(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", tiny_tokenizer_folder)
    decoder = open_checkpoint(folder).decoder
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter.create(decoder, rank=4, alpha=8, targets=["q_proj", "down_proj"], generator=generator)
    for _, b in adapter.pairs.values():
        b.normal_(0, 0.3, generator=generator)
    (tmp_path / "adapter").mkdir()
    adapter.save(tmp_path / "adapter", str(folder))
    merge(tmp_path / "adapter", tmp_path / "merged")
    found = gguf(tmp_path / "adapter", tmp_path / "x.gguf", "bf16")
    assert found.checkpoint == manifest.read(tmp_path / "adapter").id
    back = again(tmp_path / "x.gguf", tmp_path / "back")
    assert torch.equal(logits(back), logits(tmp_path / "merged"))
    assert not torch.equal(logits(back), logits(folder))
    layout_folder = tmp_path / "small"
    layout_folder.mkdir()
    layout.write(decoder, layout_folder, folder)
    adapter.save(tmp_path / "adapter", str(layout_folder))
    with pytest.raises(CheckpointError, match="merge the adapter into the model before quantising it"):
        gguf(tmp_path / "adapter", tmp_path / "y.gguf")
    assert not (tmp_path / "y.gguf").exists()


def test_the_gguf_package_reads_its_metadata(tiny_model: Path, tmp_path: Path) -> None:
    gguf(tiny_model, tmp_path / "x.gguf")
    reader = GGUFReader(tmp_path / "x.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    config = json.loads((tiny_model / "config.json").read_text())
    assert found["general.architecture"] == "llama"
    assert found["general.name"] == "tiny"
    assert found["general.file_type"] == 7
    assert found["llama.context_length"] == 512
    assert found["llama.embedding_length"] == 64
    assert found["llama.block_count"] == 2
    assert found["llama.feed_forward_length"] == 96
    assert found["llama.attention.head_count"] == 4
    assert found["llama.attention.head_count_kv"] == 2
    assert found["llama.rope.dimension_count"] == found["llama.attention.key_length"] == 16
    assert found["llama.rope.freq_base"] == 10000
    assert found["llama.vocab_size"] == len(found["tokenizer.ggml.tokens"]) == config["vocab_size"]
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"].startswith("{% for message in messages %}")
    assert {one.name: one.tensor_type.name for one in reader.tensors}["blk.1.ffn_up.weight"] == "Q8_0"


def test_scaling_of_rotary_embeddings_is_said(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", tiny_tokenizer_folder, "llama-yarn")
    gguf(folder, tmp_path / "x.gguf")
    metadata = GGUF(tmp_path / "x.gguf").metadata
    assert metadata["llama.rope.scaling.type"] == "yarn"
    assert metadata["llama.rope.scaling.factor"] == 4
    assert metadata["llama.rope.scaling.original_context_length"] == 32
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"]["beta_fast"] = 16
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="beta_fast = 16, which GGUF cannot say"):
        gguf(folder, tmp_path / "x.gguf")
    made(tmp_path / "other", tiny_tokenizer_folder, "llama-biases")
    with pytest.raises(CheckpointError, match="biases in its feed-forward"):
        gguf(tmp_path / "other", tmp_path / "x.gguf")


def test_weights_that_no_file_can_hold_leave_none(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", tiny_tokenizer_folder)
    decoder, broken = open_checkpoint(folder).decoder, tmp_path / "broken"
    broken.mkdir()
    for value, kind, error, message in (
        (1e6, "f16", ConfigError, "choose bf16 or f32"),
        (float("nan"), "q8_0", CheckpointError, "not finite"),
    ):
        with torch.no_grad():
            decoder.model.layers[1].mlp.up_proj.weight[3, 3] = value
        weights.save(decoder, broken, folder)
        with pytest.raises(error, match=rf"'model\.layers\.1\.mlp\.up_proj\.weight' .*{message}"):
            gguf(broken, tmp_path / "x.gguf", kind)  # type: ignore[arg-type]
        assert {entry.name for entry in tmp_path.iterdir()} == {"model", "broken"}
