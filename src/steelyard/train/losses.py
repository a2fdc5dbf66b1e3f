"""Cross-entropy of the tokens that count: logits for those alone, never all at once, and their gradient on the way.

The forward pass of a chunk already makes the gradients of its hidden states and of the head, so no logits are kept and
none is computed twice.
"""

# N trained tokens  D model width  V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from steelyard.kernels.training import accumulate_, cross_entropy_

CHUNK = 1024  # rows of logits in memory at a time
WORDS = 8192  # of the vocabulary, whose gradient is made at a time


def cross_entropy(hidden_states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target) in nats, float32.

    Args:
        hidden_states: `[N, D]`, each of the token before its target.
        head: `[V, D]`, of the same dtype; its logits are `hidden_states @ head.T`.
        targets: `[N]` int64.
    """
    total: torch.Tensor = _CrossEntropy.apply(hidden_states, head, targets)  # type: ignore[no-untyped-call]
    return total


def token_losses(hidden_states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) of each token in nats, `[N]` float32; see `cross_entropy`. The head is frozen."""
    assert not head.requires_grad, "its gradient is not made here"
    losses: torch.Tensor = _TokenLosses.apply(hidden_states, head, targets)  # type: ignore[no-untyped-call]
    return losses


def _chunks(
    hidden_states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Chunk by chunk: which tokens, their losses, and the gradients of their logits."""
    for begin in range(0, len(targets), CHUNK):
        rows = slice(begin, begin + CHUNK)
        logits = hidden_states[rows] @ head.T
        losses = cross_entropy_(logits, targets[rows])
        yield rows, losses, logits


def _total(
    hidden_states: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    dstates: torch.Tensor | None,
    dhead: torch.Tensor | None,
) -> torch.Tensor:
    """The sum of the losses; the gradients, where they are wanted, are put into `dstates` and added to `dhead`."""
    total = hidden_states.new_zeros((), dtype=torch.float32)
    for rows, losses, dlogits in _chunks(hidden_states, head, targets):
        total += losses.sum()
        if dstates is not None:
            torch.mm(dlogits, head, out=dstates[rows])
        if dhead is not None:
            for begin in range(0, len(dhead), WORDS):
                words = slice(begin, begin + WORDS)
                accumulate_(dhead[words], dlogits[:, words].T @ hidden_states[rows])
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        needs_states, needs_head, _ = ctx.needs_input_grad
        dstates = torch.empty_like(hidden_states) if needs_states else None
        dhead = torch.zeros(head.shape, dtype=torch.float32) if needs_head else None
        total = _total(hidden_states, head, targets, dstates, dhead)
        ctx.save_for_backward(dstates, None if dhead is None else dhead.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        by = float(gradient)  # in float32, rounded once
        found = [None if kept is None else kept * by for kept in ctx.saved_tensors]
        return found[0], found[1], None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(targets), dtype=torch.float32)
        dstates = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        for rows, losses, dlogits in _chunks(hidden_states, head, targets):
            found[rows] = losses
            if dstates is not None:
                torch.mm(dlogits, head, out=dstates[rows])
        ctx.save_for_backward(dstates)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (dstates,) = ctx.saved_tensors
        return (dstates * gradient[:, None]).to(dstates.dtype), None, None
