"""What the loop knows of a task: rows by number, parameters by name, a loss to sum, a way to measure and to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch


class Task(Protocol):
    """What is learnt, from which rows. Every network and modality is one of these to the trainer."""

    rows: int
    """How many there are to learn from."""
    padded: bool
    """Whether the rows of a forward pass are padded to the longest; otherwise they lie side by side."""
    whole: bool
    """Whether the rows of a forward pass belong together, so that a batch is cut as little as can be."""
    parameters: dict[str, torch.Tensor]
    """What is trained, in the dtype that the forward pass uses."""

    def size(self, row: int) -> int:
        """What a row takes in a forward pass: its tokens, patches or frames."""
        ...

    def targets(self, rows: Sequence[int]) -> int:
        """How many terms the loss of some rows has."""
        ...

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """The sum of these terms over some rows that fit into one forward pass, float32."""
        ...

    def train(self, on: bool) -> None:
        """Whether the network is being trained: dropout and augmentation are on."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """What is measured on the way; `validation_loss` decides which checkpoint is best. Empty: nothing is."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was learnt, as a checkpoint's files."""
        ...
