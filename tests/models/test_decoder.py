"""The decoder against transformers: every family, every switch, on small random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, SIZES, make
from steelyard.errors import CheckpointError
from steelyard.models import config as decoder_config
from steelyard.models import weights
from steelyard.models.attention import PackedAttention


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path: Path, family: str) -> None:
    reference = make(tmp_path, family)
    decoder = weights.load(tmp_path, torch.float32)
    token_ids = torch.randint(97, (50,))
    with torch.no_grad():
        expected = reference(token_ids[None]).logits[0]
        ours = decoder.logits(decoder(token_ids, torch.arange(50), PackedAttention([50])))
    # Error: float32 rounding alone (measured 2e-6 on logits of size 1).
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "gemma3"])
def test_rows_of_a_pack_do_not_see_each_other(tmp_path: Path, family: str) -> None:
    reference = make(tmp_path, family)
    decoder = weights.load(tmp_path, torch.float32)
    lengths = [5, 31, 1, 30, 12, 6]
    rows = [torch.randint(97, (length,)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        ours = decoder.logits(decoder(torch.cat(rows), positions, PackedAttention(lengths)))
        expected = torch.cat([reference(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


def test_branches_share_their_trunk_and_do_not_see_each_other(tmp_path: Path) -> None:
    reference = make(tmp_path, "smollm")
    decoder = weights.load(tmp_path, torch.float32)
    trunk, tails = torch.randint(97, (9,)), [torch.randint(97, (length,)) for length in (3, 1, 4)]
    row = torch.cat([trunk, *tails])
    branches = torch.tensor([0] * 9 + [1] * 3 + [2] + [3] * 4)
    positions = torch.cat([torch.arange(9), *(9 + torch.arange(len(tail)) for tail in tails)])
    # A second row, shorter, shares the pack.
    attend = PackedAttention([17, 9], torch.cat([branches, torch.zeros(9, dtype=torch.int64)]))
    with torch.no_grad():
        hidden = decoder(torch.cat([row, trunk]), torch.cat([positions, torch.arange(9)]), attend)
        ours = decoder.logits(hidden)
        start = 9
        for tail in tails:
            expected = reference(torch.cat([trunk, tail])[None]).logits[0]
            torch.testing.assert_close(ours[start : start + len(tail)], expected[9:], atol=2e-5, rtol=1e-5)
            start += len(tail)
        torch.testing.assert_close(ours[17:], reference(trunk[None]).logits[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "mistral", "gemma3"])
def test_gradients_equal_transformers(tmp_path: Path, family: str) -> None:
    reference = make(tmp_path, family)
    decoder = weights.load(tmp_path, torch.float32).requires_grad_(True)
    token_ids = torch.randint(97, (20,))
    reference(token_ids[None]).logits.logsumexp(-1).sum().backward()
    decoder.logits(decoder(token_ids, torch.arange(20), PackedAttention([20]))).logsumexp(-1).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-4, rtol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_size": None}, "config.json"),
        ({"num_attention_heads": 5}, "heads"),
        ({"vocab_size": 0}, "at least 1"),
    ],
)
def test_what_is_not_known_is_refused_by_name(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        decoder_config.parse({"model_type": "llama", **SIZES, **fields})


GEMMA = {**SIZES, "model_type": "gemma3_text", "head_dim": 16, "layer_types": ["sliding_attention"] * 3}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ({"sliding_window": 0}, "at least 1"),
        ({"sliding_window": None}, "config.json"),
        ({"sliding_window_pattern": 0, "layer_types": None}, "config.json"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "'linear' lacks"),
        ({"model_type": "gemma3"}, "'gemma3' is not known here"),
        ({"model_type": "gemma2"}, "'gemma2' is not known here"),
    ],
)
def test_what_gemma_has_and_is_not_known_is_refused_by_name(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        decoder_config.parse({**GEMMA, **fields})


def test_gemma_is_read_in_its_older_form_too() -> None:
    older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    newer = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    pattern = decoder_config.parse({**GEMMA, **older, "layer_types": None, "sliding_window_pattern": 3})
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    assert pattern == decoder_config.parse({**GEMMA, "rope_parameters": newer, "layer_types": kinds})
    assert pattern.windows == (4096, 4096, None)
    assert pattern.tied


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "llama2")
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"vocab_size": 97', '"vocab_size": 98'))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        weights.load(tmp_path)


@pytest.mark.parametrize("family", ["smollm", "gemma3"])
def test_training_in_bfloat16_sees_the_gradients_of_float32(tmp_path: Path, family: str) -> None:
    """The fused kernels, with blocks made again and without."""
    make(tmp_path, family, hidden_size=96, intermediate_size=160, head_dim=32)
    exact = weights.load(tmp_path, torch.float32).requires_grad_(True)
    token_ids = torch.randint(97, (32,), generator=torch.Generator().manual_seed(0))
    places = torch.arange(32)
    exact.logits(exact(token_ids, places, PackedAttention([32]))).logsumexp(-1).sum().backward()
    expected = dict(exact.named_parameters())
    for again in (False, True):
        decoder = weights.load(tmp_path, torch.bfloat16).requires_grad_(True)
        decoder.recompute_blocks = again
        decoder.logits(decoder(token_ids, places, PackedAttention([32]))).float().logsumexp(-1).sum().backward()
        for name, parameter in decoder.named_parameters():
            assert parameter.grad is not None
            truth = expected[name].grad
            assert truth is not None
            assert float((parameter.grad.float() - truth).norm() / truth.norm()) < 0.08, name


@pytest.mark.slow
def test_smollm2_logits_equal_transformers(smollm2: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    decoder = weights.load(smollm2, torch.float32)
    token_ids = torch.randint(49152, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(token_ids[None]).logits[0]
        ours = decoder.logits(decoder(token_ids, torch.arange(200), PackedAttention([200])))
    # Logits reach 40; float32 rounding through 30 layers leaves about 1e-4.
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)
