"""Dropout (Srivastava et al. 2014) whose numbers are drawn four at a time.

PyTorch's CPU generator makes one number after the other, which took an eighth of an encoder's training step; 16 of its
bits are enough for one element, so each draw of 64 does for four.
"""

from __future__ import annotations

import torch
from torch import nn

from steelyard.errors import CheckpointError

STEPS = 1 << 16
"""Into which a probability is divided."""


class Dropout(nn.Module):
    """Elements are 0 with probability `p` while the network is trained, and the others larger by as much.

    Raises:
        CheckpointError: `p` is no probability.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise CheckpointError(f"a dropout of {p} is no probability")
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape -> the same."""
        return dropout(x, self.p) if self.training else x


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Elements are 0 with probability `p` (in steps of 1/65536), the others divided by 1 - p."""
    hidden = round(p * STEPS)
    if not hidden:
        return x
    if hidden == STEPS:
        return x * 0
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= hidden - STEPS // 2
    return x * kept.to(x.dtype).mul_(STEPS / (STEPS - hidden))
