from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import (
    F32,
    HEAD,
    HEADS,
    KEY_HEADS,
    STRING,
    U32,
    WIDTH,
    GGUFSpec,
    bpe_pairs,
    f32,
    model_pairs,
    model_tensors,
    model_weights,
    pair,
    permute,
    text,
    tiny_model,
)

from steelyard.checkpoint import bfloat16, gguf_convert, gguf_places, safetensors
from steelyard.checkpoint.gguf import GGUF
from steelyard.checkpoint.gguf_config import read_config
from steelyard.errors import ArtifactError


def converted(spec: GGUFSpec, folder: Path) -> dict[str, Any]:
    spec.write(folder / "x.gguf")
    out = folder / "out"
    out.mkdir()
    gguf_convert.convert(folder / "x.gguf", out)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def without(pairs: list[bytes], *keys: str) -> list[bytes]:
    return [raw for raw in pairs if not raw.startswith(tuple(text(key) for key in keys))]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_transformers_opens_it_with_the_weights_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(gguf_convert, "PIECE_VALUES", 5 * WIDTH)  # several pieces even in a tiny model
    weights = tiny_model(tmp_path / "x.gguf", architecture, tied)
    out = tmp_path / "out"
    out.mkdir()
    reports: list[tuple[str, int, int | None]] = []
    gguf_convert.convert(tmp_path / "x.gguf", out, lambda *report: reports.append(report))
    stored = safetensors.read(out / "model.safetensors")
    assert stored.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(bfloat16.from_bits(stored[name]), values, err_msg=name)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}
    assert type(model).__name__ == names[architecture] + "ForCausalLM"
    assert model.config.rms_norm_eps == 1e-5
    rope = model.config.rope_parameters
    if architecture == "gemma3":
        assert rope["sliding_attention"]["rope_theta"] == 10_000.0
        assert model.config.layer_types == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
        assert (model.config.sliding_window, model.config.query_pre_attn_scalar) == (7, HEAD)
        rope = rope["full_attention"]
    assert rope["rope_theta"] == 50000.0
    assert model.config.tie_word_embeddings is tied
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)
    assert reports[-1][1] == reports[-1][2] == 2 * sum(values.size for values in weights.values())


def test_gemma_says_what_transformers_says(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from steelyard.models import weights
    from steelyard.models.attention import PackedAttention

    tiny_model(tmp_path / "x.gguf", "gemma3")
    (tmp_path / "out").mkdir()
    gguf_convert.convert(tmp_path / "x.gguf", tmp_path / "out")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    decoder = weights.load(tmp_path / "out", torch.float32)
    token_ids = torch.randint(262, (50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(token_ids[None]).logits[0]
        ours = decoder.logits(decoder(token_ids, torch.arange(50), PackedAttention([50])))
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("layers", "scalar"), [(26, 256), (62, 168)])
def test_the_one_gemma_that_scales_its_queries_otherwise(tmp_path: Path, layers: int, scalar: int) -> None:
    sizes = {"block_count": layers, "embedding_length": 5376, "attention.head_count": 32}
    sizes |= {"attention.head_count_kv": 16, "attention.key_length": 256, "attention.value_length": 256}
    pairs = without(model_pairs("gemma3"), *(f"gemma3.{key}" for key in sizes))
    pairs += [pair(f"gemma3.{key}", U32, value) for key, value in sizes.items()]
    tensors = [f32(f"{name}.weight", np.zeros((2, 2), np.float32)) for name in ["token_embd", *map(str, range(layers))]]
    config = read_config(GGUF(GGUFSpec(pairs, tensors).write(tmp_path / "x.gguf")))
    assert config["query_pre_attn_scalar"] == scalar


def test_unpermute_restores_transformers_rotary_convention() -> None:
    """Scores are the same when GGUF's pairs are rotated by GGUF's rule, and Hugging Face's by transformers'."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    random = np.random.default_rng(0)
    weights = random.normal(size=(HEADS * HEAD, WIDTH)).astype(np.float32)
    hidden = random.normal(size=(5, WIDTH)).astype(np.float32)
    angles = np.outer(np.arange(5), 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD))
    # GGUF: neighbours (2i, 2i+1) turn by angle i.
    stored = permute(weights, HEADS)
    pairs = (hidden @ stored.T).reshape(5, HEADS, HEAD // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    expected = (turned[:, None] * turned.conj()[None]).real.sum(-1)
    # transformers: (i, i + half) turn by angle i.
    rows = gguf_places.unpermute(stored, HEADS)
    np.testing.assert_array_equal(rows, weights)
    query = torch.from_numpy(hidden @ rows.T).view(1, 5, HEADS, HEAD).transpose(1, 2)
    full = torch.from_numpy(np.concatenate((angles, angles), axis=1)).float()[None]
    turned_query, turned_key = apply_rotary_pos_emb(query, query, full.cos(), full.sin())
    scores = (turned_query @ turned_key.transpose(2, 3))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)


def test_attention_bias_of_a_llama(tmp_path: Path) -> None:
    weights = model_weights()
    for layer in range(2):
        for name, rows in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS), ("o", HEADS)):
            weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = np.arange(rows * HEAD, dtype=np.float32)
    config = converted(GGUFSpec(model_pairs() + bpe_pairs(), model_tensors(weights)), tmp_path)
    assert config["attention_bias"] is True
    stored = safetensors.read(tmp_path / "out" / "model.safetensors")
    for name, values in weights.items():
        np.testing.assert_array_equal(bfloat16.from_bits(stored[name]), values, err_msg=name)


def test_scaling_of_rotary_embeddings(tmp_path: Path) -> None:
    pairs = [*model_pairs(), *bpe_pairs(), pair("llama.rope.scaling.type", STRING, "linear")]
    pairs.append(pair("llama.rope.scaling.factor", F32, 4.0))
    config = converted(GGUFSpec(pairs, model_tensors(model_weights())), tmp_path)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_llama3_scaling_is_recognised_from_its_factors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    wanted = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    reference = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=wanted | {"rope_theta": 500000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](reference, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    factors = (plain / scaled.numpy()).astype(np.float32)
    pairs = without(model_pairs(), "llama.rope.freq_base")
    pairs += [
        pair("llama.rope.freq_base", F32, 500000.0),
        pair("llama.attention.key_length", U32, 64),
        pair("llama.attention.value_length", U32, 64),
    ]
    weights = model_weights()
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn."
        for name, rows in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            weights[f"{at}{name}_proj.weight"] = np.zeros((rows * 64, WIDTH), np.float32)
        weights[f"{at}o_proj.weight"] = np.zeros((WIDTH, HEADS * 64), np.float32)
    tensors = model_tensors(weights)
    config = converted(GGUFSpec([*pairs, *bpe_pairs()], [*tensors, f32("rope_freqs.weight", factors)]), tmp_path)
    assert config["rope_scaling"] == wanted
    other = GGUFSpec([*pairs, *bpe_pairs()], [*tensors, f32("rope_freqs.weight", factors * 1.01)])
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtifactError, match="rope_freqs"):
        converted(other, tmp_path / "other")


def test_end_of_turn_joins_the_end_tokens(tmp_path: Path) -> None:
    pairs = [*model_pairs(), *bpe_pairs(), pair("tokenizer.ggml.eot_token_id", U32, 0)]
    config = converted(GGUFSpec(pairs, model_tensors(model_weights())), tmp_path)
    assert config["eos_token_id"] == [2, 0]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


REFUSED: dict[str, tuple[list[bytes], str]] = {
    "architecture": ([pair("general.architecture", STRING, "gemma2")], "architecture 'gemma2'; read are llama"),
    "no layers": ([pair("llama.block_count", U32, 0)], "block_count"),
    "many layers": ([pair("llama.block_count", U32, 100_000)], "claims 100000 layers"),
    "one layer more": ([pair("llama.block_count", U32, 3)], "no tensor 'blk.2.attn_norm.weight'"),
    "one layer less": ([pair("llama.block_count", U32, 1)], "no place for"),
    "width": ([pair("llama.embedding_length", U32, 64)], "of shape"),
    "inner width": ([pair("llama.feed_forward_length", U32, 47)], "'blk.0.ffn_gate.weight' of shape"),
    "width as text": ([pair("llama.embedding_length", STRING, "32")], "embedding_length"),
    "heads": ([pair("llama.attention.head_count", U32, 3)], "do not fit"),
    "key heads": ([pair("llama.attention.head_count_kv", U32, 3)], "do not fit"),
    "epsilon": ([pair("llama.attention.layer_norm_rms_epsilon", F32, math.nan)], "epsilon"),
    "theta": ([pair("llama.rope.freq_base", F32, -1.0)], "freq_base"),
    "experts": ([pair("llama.expert_count", U32, 8)], "expert_count"),
    "partial rotary": ([pair("llama.rope.dimension_count", U32, 4)], "head dimension"),
    "softcapping": ([pair("llama.attn_logit_softcapping", F32, 50.0)], "attn_logit_softcapping"),
    "window": ([pair("llama.attention.sliding_window", U32, 64)], "sliding_window"),
    "odd scaling": ([pair("llama.rope.scaling.type", STRING, "longrope")], "longrope"),
    "part": ([pair("split.count", U32, 2)], "merge the parts"),
    "token id": ([pair("tokenizer.ggml.bos_token_id", U32, 262)], "bos_token_id"),
    "nameless": ([pair("tokenizer.ggml.model", STRING, "t5")], "kind 't5'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_is_wrong(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    keys = [raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode() for raw in changes]
    pairs = without(model_pairs() + bpe_pairs(), *keys) + changes
    with pytest.raises(ArtifactError, match=message) as caught:
        converted(GGUFSpec(pairs, model_tensors(model_weights())), tmp_path)
    assert "\n" not in str(caught.value)
    assert "x.gguf" in str(caught.value)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    tensors = [*model_tensors(model_weights()), f32("blk.0.extra.weight", np.zeros(4, np.float32))]
    with pytest.raises(ArtifactError, match=r"blk\.0\.extra\.weight"):
        converted(GGUFSpec(model_pairs() + bpe_pairs(), tensors), tmp_path)
