"""Which training algorithm fits: `optimizer.name = "auto"` asks here, and is told why."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch

from steelyard.train.optimizers import OptimizerConfig
from steelyard.train.optimizers.groups import is_hidden_matrix

AUTO = "auto"
SHARE = 0.5
"""Of the machine's memory that weights, gradients and moments may take."""
HIDDEN = 0.6
"""Share of hidden matrices from which on Muon is worth its products."""
MUON_STEPS = 200
"""Fewer are too few for its momentum to tell."""
PRETRAINED_RATE, SCRATCH_RATE = 5e-5, 1e-3


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What the choice depends on."""

    parameters: int
    """That are trained."""
    hidden: float
    """Share of them in hidden matrices."""
    adapter: bool
    """Whether low-rank pairs are trained, and the base is frozen."""
    pretrained: bool
    steps: int
    whole: bool
    """Whether each step sees all rows."""
    memory: int | None
    """Bytes that the machine has; None: nobody knows."""

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, torch.Tensor],
        *,
        adapter: bool,
        pretrained: bool,
        steps: int,
        whole: bool,
        memory: int | None,
    ) -> Situation:
        """Of what a task trains."""
        count = sum(tensor.numel() for tensor in parameters.values())
        hidden = sum(tensor.numel() for name, tensor in parameters.items() if is_hidden_matrix(name, tensor))
        return cls(
            parameters=count,
            hidden=hidden / max(1, count),
            adapter=adapter,
            pretrained=pretrained,
            steps=steps,
            whole=whole,
            memory=memory,
        )


def choose(asked: OptimizerConfig, at: Situation) -> tuple[OptimizerConfig, str]:
    """An optimizer for a situation, and why; other settings that were asked for stay.

    Masters and gradients take 8 bytes a parameter, Adam's moments 8 more, Lion's 4, Adafactor's next to nothing.
    """
    room = None if at.memory is None else SHARE * at.memory
    if room is not None and 12 * at.parameters > room:
        return _with(asked, "adafactor"), (
            f"adafactor: {at.parameters / 1e6:.0f}M parameters with full moments would take more than half of the"
            " memory; it keeps only their rows' and columns' means"
        )
    if room is not None and 16 * at.parameters > room:
        return _with(asked, "lion"), (
            f"lion: {at.parameters / 1e6:.0f}M parameters with two moments would take more than half of the memory;"
            " it keeps one"
        )
    if at.adapter:
        return _with(asked, "adamw"), "adamw: low-rank pairs are few parameters of uneven scale, which it evens out"
    if at.pretrained:
        return _with(asked, "adamw", PRETRAINED_RATE), (
            "adamw, by default at a low rate: trained weights want small steps, each in proportion to its own gradients"
        )
    if at.whole:
        return _with(asked, "adamw"), "adamw: every step sees all rows, so there is no noise that would want averaging"
    if at.hidden >= HIDDEN and at.steps >= MUON_STEPS:
        return _with(asked, "muon"), (
            f"muon: from scratch, with {at.hidden:.0%} of the parameters in hidden matrices and {at.steps} steps to go"
        )
    return _with(asked, "adamw", SCRATCH_RATE), (
        f"adamw: from scratch, with {at.steps} steps and {at.hidden:.0%} of the parameters in hidden matrices"
    )


def _with(asked: OptimizerConfig, name: str, learning_rate: float | None = None) -> OptimizerConfig:
    rate = learning_rate if asked.learning_rate is None else asked.learning_rate
    return msgspec.structs.replace(asked, name=name, learning_rate=rate)
