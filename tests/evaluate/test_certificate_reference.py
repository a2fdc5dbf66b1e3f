"""The certificate's figures against an independent computation with transformers, text by text."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steelyard.errors import CheckpointError
from steelyard.evaluate.certificate import Thresholds, compare, golden_texts, judge
from steelyard.models.opening import Opened, open_checkpoint


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> Opened:
    return open_checkpoint(tiny_model, torch.float32)


@pytest.fixture(scope="module")
def moved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise on every weight."""
    folder = tmp_path_factory.mktemp("moved") / "model"
    shutil.copytree(tiny_model, folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    noisy = {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_figure_equals_transformers(opened: Opened, tiny_model: Path, moved: Path) -> None:
    measured = compare(opened.decoder, open_checkpoint(moved, torch.float32).decoder, opened.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tiny_model, moved)]
    kl, errors, agree = [], [], []
    nats, size = [0.0, 0.0], 0
    for text in golden_texts():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :512]
        size += len(tokenizer.decode(ids[0], clean_up_tokenization_spaces=False).encode())
        with torch.inference_mode():
            logits = [model(ids).logits[0, :-1] for model in models]
        p, q = (x.double().log_softmax(-1) for x in logits)
        kl.append((p.exp() * (p - q)).sum(-1))
        errors.append(((logits[0] - logits[0].mean(-1, True)) - (logits[1] - logits[1].mean(-1, True))).abs().max())
        agree.append(p.argmax(-1) == q.argmax(-1))
        for side, x in enumerate((p, q)):
            nats[side] -= float(x.gather(1, ids[0, 1:, None]).sum())
    divergence = torch.cat(kl)
    assert measured["tokens"] == len(divergence)
    assert measured["kl_mean"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert measured["kl_max"] == pytest.approx(float(divergence.max()), rel=1e-3)
    assert measured["max_logit_error"] == pytest.approx(float(torch.stack(errors).max()), rel=1e-3)
    assert measured["top1_agreement"] == pytest.approx(float(torch.cat(agree).double().mean()), abs=2e-3)
    before, after = (total / math.log(2) / size for total in nats)
    assert measured["bits_per_byte_before"] == pytest.approx(before, rel=1e-5)
    assert measured["bits_per_byte_after"] == pytest.approx(after, rel=1e-5)
    assert measured["bits_per_byte_change"] == pytest.approx(after / before - 1, abs=1e-5)


def test_a_model_that_answers_nan_never_passes_and_hides_nothing(opened: Opened, tiny_model: Path) -> None:
    broken = open_checkpoint(tiny_model, torch.float32).decoder
    with torch.no_grad():
        broken.lm_head.weight[7] = math.nan
    measured = compare(opened.decoder, broken, opened.tokenizer)
    for name in ("kl_mean", "kl_max", "max_logit_error", "bits_per_byte_after", "bits_per_byte_change"):
        assert math.isnan(measured[name]), name
    assert not judge(measured, Thresholds(bits_per_byte=math.inf), parent="x", bytes_before=1, bytes_after=1).passed


def test_a_tokenizer_that_knows_nothing_certifies_nothing(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened.tokenizer, "encode_plain", lambda text: [])
    with pytest.raises(CheckpointError, match="nothing can be certified"):
        compare(opened.decoder, opened.decoder, opened.tokenizer)
