"""DoRA against peft: the same outputs and gradients, files that go both ways, merging, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from steelyard.errors import CheckpointError
from steelyard.infer.engine import Engine
from steelyard.models import dora, lora, weights
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.dora import DoraAdapter
from steelyard.models.lora import Adapter
from steelyard.stages.evaluate import evaluate
from steelyard.stages.formats import trained_format
from steelyard.stages.merge import merge
from steelyard.stages.train import train
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.lora import LoraConfig as Settings
from steelyard.train.optimizers import OptimizerConfig

TARGETS = ("q_proj", "o_proj", "gate_proj", "down_proj")


def logits(decoder: Decoder, token_ids: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
    length = len(token_ids)
    return decoder.logits(decoder(token_ids, torch.arange(length), PackedAttention([length]), adapter))


@pytest.fixture
def theirs(tiny_model: Path) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=list(TARGETS), use_dora=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model


def test_outputs_and_gradients_are_pefts(theirs: PeftModel, tiny_model: Path, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    decoder = weights.load(tiny_model, torch.float32)
    ours = dora.load(tmp_path, decoder)
    assert isinstance(ours, DoraAdapter)
    for _, tensor in ours.parameters():
        tensor.requires_grad_(True)
    token_ids = torch.arange(3, 23)
    expected, found = theirs(token_ids[None]).logits[0], logits(decoder, token_ids, ours)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    expected.square().mean().backward()
    found.square().mean().backward()
    named = {name.replace(".default", ""): parameter for name, parameter in theirs.named_parameters()}
    for name, tensor in ours.parameters():
        key = f"base_model.model.{name}"
        other = named.get(key, named.get(f"{key}.weight"))
        assert other is not None
        torch.testing.assert_close(tensor.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_what_is_saved_opens_in_peft(theirs: PeftModel, tiny_model: Path, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    decoder = weights.load(tiny_model, torch.float32)
    ours = dora.load(tmp_path / "theirs", decoder)
    (tmp_path / "ours").mkdir()
    ours.save(tmp_path / "ours", str(tiny_model))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path / "ours")
    token_ids = torch.arange(3, 23)
    with torch.no_grad():
        torch.testing.assert_close(again(token_ids[None]).logits, theirs(token_ids[None]).logits, atol=1e-5, rtol=1e-4)


def test_merged_it_says_the_same(theirs: PeftModel, tiny_model: Path, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    decoder = weights.load(tiny_model, torch.float32)
    ours = dora.load(tmp_path, decoder)
    token_ids = torch.arange(3, 23)
    with torch.no_grad():
        before = logits(decoder, token_ids, ours)
        lora.merge(decoder, ours)
        torch.testing.assert_close(logits(decoder, token_ids, None), before, atol=1e-4, rtol=1e-4)


def test_fresh_it_changes_nothing(tiny_model: Path) -> None:
    decoder = weights.load(tiny_model, torch.float32)
    plain = Adapter.create(decoder, rank=4, alpha=8, targets=TARGETS, generator=torch.Generator().manual_seed(0))
    fresh = DoraAdapter.begin(plain, decoder)
    token_ids = torch.arange(3, 23)
    with torch.no_grad():
        torch.testing.assert_close(logits(decoder, token_ids, fresh), logits(decoder, token_ids, None))


def test_trained_evaluated_and_merged(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{word} {number}", "label": word[:1]} for number in range(20) for word in ("apple", "bread")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        model=str(tiny_model),
        output=str(tmp_path / "run"),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), holdout=8),
        epochs=2,
        lora=Settings(rank=4, dora=True, dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    done = train(config)
    path = Path(str(done.path))
    assert json.loads((path / "adapter_config.json").read_text())["use_dora"] is True
    made = merge(path, tmp_path / "merged")
    assert made.startswith("sha256:")
    losses = [
        evaluate(place, tmp_path / "rows.jsonl", trained_format(place)).accuracy  # type: ignore[union-attr]
        for place in (path, tmp_path / "merged")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    said = json.loads((tmp_path / "merged" / "steelyard.json").read_text())
    assert said["parent"] == done.id
    decoder = weights.load(tiny_model)
    with pytest.raises(CheckpointError, match="steelyard merge"):
        Engine(decoder, Tokenizer.load(tiny_model), {"a": path})
    with pytest.raises(CheckpointError, match="steelyard merge"):
        Engine(decoder, Tokenizer.load(tiny_model), {"a": dora.load(path, decoder)})


def test_what_does_not_fit_is_named(theirs: PeftModel, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs.save_pretrained(tmp_path)
    decoder = weights.load(tiny_model, torch.float32)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "magnitude" in name)
    save_file({**tensors, name: torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lacks a magnitude"):
        dora.load(tmp_path, decoder)
    with pytest.raises(CheckpointError, match="use_dora = True is not known here: run `steelyard merge` first"):
        Adapter.load(tmp_path, decoder)
