"""Speed is that of an engine; what an engine holds is told."""

from __future__ import annotations

from pathlib import Path

import torch

from families import make
from steelyard.compress.quantize import layout
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.infer import speed
from steelyard.models import weights
from steelyard.text.tokenizer import Tokenizer


def test_figures(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_model)
    dense = weights.load(tiny_model, torch.bfloat16)
    used = iter(range(0, 1000, 5))
    before = speed.measure(dense, tokenizer, lambda: float(next(used)), rounds=2)
    assert min(before.tokens_per_second, before.throughput, before.latency) > 0
    assert before.energy == 5 / (16 * 64)
    layout.write(dense, tmp_path, tiny_model, QuantizeConfig(group=16))
    after = speed.measure(weights.load(tmp_path), tokenizer, rounds=1)
    assert after.energy is None
    assert 0.4 < after.memory / before.memory < 0.8


def test_without_a_plan(tmp_path: Path, tiny_model: Path) -> None:
    make(tmp_path, "smollm")
    dense = weights.load(tmp_path, torch.float32)
    found = speed.measure(dense, Tokenizer.load(tiny_model), rounds=1)
    assert found.memory == 4 * sum(parameter.numel() for parameter in dense.parameters())
