"""Which optimizer is chosen, and that its reason is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steelyard.train.choice import Situation, choose
from steelyard.train.optimizers import OptimizerConfig, build

USUAL: dict[str, Any] = {
    "parameters": 1_000_000,
    "hidden": 0.8,
    "adapter": False,
    "pretrained": False,
    "steps": 1000,
    "whole": False,
    "memory": 24 << 30,
}


@pytest.mark.parametrize(
    ("fields", "name", "rate", "reason"),
    [
        ({"adapter": True, "pretrained": True}, "adamw", None, "low-rank"),
        ({"pretrained": True}, "adamw", 5e-5, "trained weights"),
        ({}, "muon", None, "from scratch, with 80%"),
        ({"memory": None}, "muon", None, "from scratch"),
        ({"hidden": 0.1}, "adamw", 1e-3, "10%"),
        ({"steps": 50}, "adamw", 1e-3, "50 steps"),
        ({"whole": True}, "adamw", None, "all rows"),
        ({"parameters": 900_000_000}, "lion", None, "keeps one"),
        ({"parameters": 7_000_000_000, "pretrained": True}, "adafactor", None, "means"),
    ],
)
def test_the_choice_and_why(fields: dict[str, Any], name: str, rate: float | None, reason: str) -> None:
    found, why = choose(OptimizerConfig(name="auto"), Situation(**{**USUAL, **fields}))
    assert (found.name, found.learning_rate) == (name, rate)
    assert why.startswith(name)
    assert reason in why
    build({"layers.0.w.weight": torch.zeros(2, 2)}, found)


def test_what_was_asked_for_stays() -> None:
    asked = OptimizerConfig(name="auto", learning_rate=0.25, layer_decay=0.9)
    found, _ = choose(asked, Situation(**{**USUAL, "pretrained": True}))
    assert (found.learning_rate, found.layer_decay) == (0.25, 0.9)


def test_a_situation_is_read_off_the_parameters() -> None:
    parameters = {
        "embed.weight": torch.zeros(10, 4),
        "layers.0.q.weight": torch.zeros(4, 4),
        "layers.0.q.bias": torch.zeros(4),
    }
    found = Situation.of(parameters, adapter=False, pretrained=True, steps=5, whole=False, memory=None)
    assert found.parameters == 60
    assert found.hidden == pytest.approx(16 / 60)
