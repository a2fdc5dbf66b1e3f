"""Wanda (Sun et al. 2024, equation 1): what goes is small by its own size times that of the inputs it meets."""

from __future__ import annotations

import torch


def scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Weights `[N, M]` and sums of their inputs' squares `[M]` -> `[N, M]`, to be compared within a row."""
    return weight.float().abs() * squares.sqrt()
