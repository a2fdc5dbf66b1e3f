"""Preference learning against its formula by transformers and autograd; and by the stage that users call."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_trainer import base, token_rows
from transformers import AutoModelForCausalLM

from steelyard.data import preference as data
from steelyard.data.rows import TokenRow
from steelyard.errors import ConfigError, DataError
from steelyard.models import lora as adapters
from steelyard.models import weights
from steelyard.stages.train import train
from steelyard.train import lora
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.lora import LoraConfig
from steelyard.train.optimizers import OptimizerConfig
from steelyard.train.preference import PreferenceLearning

__all__ = ["base"]  # a fixture


def log_probability(model: torch.nn.Module, row: TokenRow) -> torch.Tensor:
    logits = model(torch.tensor([row.tokens])).logits[0]
    where = torch.tensor(row.trained).nonzero().flatten()
    return -F.cross_entropy(logits[where - 1], torch.tensor(row.tokens)[where], reduction="sum")


def test_the_loss_is_the_formula(base: Path) -> None:
    """The policy is the merged model, the reference the base: both by transformers, the gradient by differences."""
    pairs = list(zip(token_rows(5, seed=1), token_rows(5, seed=2), strict=True))
    decoder = weights.load(base, torch.float32)
    adapter = lora.start(decoder, LoraConfig(rank=4, alpha=8), 0)
    generator = torch.Generator().manual_seed(3)
    for _, tensor in adapter.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    task = PreferenceLearning(decoder, adapter, pairs, pairs[:2], 0.3, base)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = copy.deepcopy(decoder)
    adapters.merge(merged, adapter)
    policy = copy.deepcopy(reference)
    policy.load_state_dict(dict(merged.named_parameters()), strict=False)
    with torch.no_grad():
        margins = torch.stack(
            [
                0.3
                * (
                    (log_probability(policy, good) - log_probability(reference, good))
                    - (log_probability(policy, bad) - log_probability(reference, bad))
                )
                for good, bad in pairs
            ]
        )
    found = task.loss(range(5))
    torch.testing.assert_close(found, -F.logsigmoid(margins).sum(), rtol=1e-4, atol=1e-4)
    measured = task.evaluate()
    assert measured["validation_loss"] == pytest.approx(float(-F.logsigmoid(margins[:2]).mean()), abs=1e-4)
    assert measured["validation_accuracy"] == float((margins[:2] > 0).float().mean())
    name = next(iter(task.parameters))
    for tensor in task.parameters.values():
        tensor.requires_grad_(True)
    task.loss(range(5)).backward()
    tensor = task.parameters[name]
    assert tensor.grad is not None
    gradient, step = tensor.grad.clone(), 1e-2
    with torch.no_grad():
        tensor += step * gradient / gradient.norm()
        after = float(task.loss(range(5)))
        tensor -= 2 * step * gradient / gradient.norm()
        before = float(task.loss(range(5)))
    assert (after - before) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.02)


def write_pairs(path: Path, count: int, first: int = 0) -> Path:
    with path.open("w") as file:
        for number in range(first, first + count):
            row = {
                "input": {"messages": [{"role": "user", "content": f"Say something {number}"}]},
                "preferred_output": [{"role": "assistant", "content": "yes"}],
                "non_preferred_output": [{"role": "assistant", "content": "no"}],
            }
            file.write(json.dumps(row) + "\n")
    return path


def configuration(folder: Path, model: Path, **fields: Any) -> TrainConfig:
    rows = write_pairs(folder / "pairs.jsonl", 16)
    data = fields.pop("data", DataConfig(train=str(rows), holdout=4))
    return TrainConfig(
        task="preference",
        model=str(model),
        output=str(folder / "run"),
        data=data,
        lora=LoraConfig(rank=4),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        **{"batch_size": 4, "epochs": 4, "dtype": "float32", **fields},
    )


def test_a_run_learns_what_is_preferred_and_resumes(tiny_model: Path, tmp_path: Path) -> None:
    results = []
    for cuts in ((), (5,)):
        folder = tmp_path / str(len(cuts))
        folder.mkdir()
        config = configuration(folder, tiny_model, dtype="bfloat16")
        for cut in cuts:
            begun: list[Any] = []
            train(
                config,
                begun=lambda trainer, counts, begun=begun: begun.append(trainer),
                report=lambda progress, cut=cut, begun=begun: setattr(begun[0], "stopping", progress.step >= cut),
            )
        results.append(train(config))
    straight, again = results
    assert straight.metrics["validation_accuracy"] == 1.0
    assert straight.metrics["validation_margin"] > 0.1
    assert straight.metrics["validation_loss"] < 0.69
    contents = [(Path(str(done.path)) / "adapter_model.safetensors").read_bytes() for done in (straight, again)]
    assert contents[0] == contents[1]


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda row: row.update(extra=1), "extra"),
        (lambda row: row.pop("input"), "input"),
        (lambda row: row["input"].update(tools=[{"type": "function"}]), "input.tools"),
        (lambda row: row["input"].update(messages=[]), "input.messages"),
        (lambda row: row["input"]["messages"][0].update(role="robot"), r"input.messages\[0\].role"),
        (lambda row: row["input"]["messages"].append({"role": "assistant", "content": "x"}), "input.messages"),
        (lambda row: row.update(preferred_output="yes"), "preferred_output"),
        (lambda row: row["preferred_output"].append({"role": "assistant", "content": "x"}), "preferred_output"),
        (lambda row: row["preferred_output"][0].update(role="user"), r"preferred_output\[0\].role"),
        (lambda row: row["non_preferred_output"][0].update(content=""), r"non_preferred_output\[0\].content"),
        (lambda row: row["non_preferred_output"][0].update(content="yes"), "non_preferred_output"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: Change, field: str) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: field '{field}'"):
        data.read(path)


def test_neutral_fields_are_taken(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 1)
    row = json.loads(path.read_text())
    row["input"] |= {"tools": [], "parallel_tool_calls": True}
    path.write_text(json.dumps(row) + "\n")
    (found,) = data.read(path)
    assert [turn.trained for turn in found.preferred.messages] == [False, True]
    assert [turn.trained for turn in found.other.messages] == [False, True]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"method": "full"}, "leave method at lora"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"data": DataConfig(train="x", too_long="drop")}, "data.too_long means"),
    ],
)
def test_what_cannot_be_run(tiny_model: Path, tmp_path: Path, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(configuration(tmp_path, tiny_model, **fields))


def test_the_validation_asks_something_else(tiny_model: Path, tmp_path: Path) -> None:
    held = write_pairs(tmp_path / "held.jsonl", 2, first=15)
    config = configuration(tmp_path, tiny_model)
    both = DataConfig(train=config.data.train, validation=str(held))
    import msgspec

    with pytest.raises(DataError, match=r"held\.jsonl:1: the same prompt is in the training file, line 16"):
        train(msgspec.structs.replace(config, data=both))
