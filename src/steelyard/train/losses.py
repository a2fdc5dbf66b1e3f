"""Cross-entropy of the tokens that count, with logits computed for those alone and never all at once."""

# N trained tokens  D model width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from steelyard.models.decoder import Decoder

CHUNK = 512  # rows of logits in memory at a time


def cross_entropy(decoder: Decoder, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target) in nats, float32.

    Args:
        decoder: computes the logits.
        hidden_states: `[N, D]`, each of the token before its target.
        targets: `[N]` int64.
    """

    def chunk(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(decoder.logits(states).float(), wanted, reduction="sum")

    if len(targets) <= CHUNK:
        return chunk(hidden_states, targets)
    total = hidden_states.new_zeros((), dtype=torch.float32)
    for states, wanted in zip(hidden_states.split(CHUNK), targets.split(CHUNK), strict=True):  # type: ignore[no-untyped-call]
        # The backward pass computes the chunk's logits again rather than keeping N x V of them.
        total = total + checkpoint(chunk, states, wanted, use_reentrant=False)
    return total
