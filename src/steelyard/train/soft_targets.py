"""What a decoder loses that is held to another's distribution of every next token, some rows of logits at a time.

loss = (1 - w) CE(token) + w T^2 D(p, q), as in `distillation.py`. The gradients are made with the logits, so that
neither the one's nor the other's are ever all in memory.
"""

# N trained tokens  D, E widths of student and teacher  V vocabulary  K tokens that are kept of a teacher

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from steelyard.train.distillation import Divergence, divergence

CHUNK = 256
"""Rows of logits in memory at a time, some six times over."""
LEAST = -30.0
"""Of a log-probability that is kept: what is less likely is as good as impossible, and stays finite."""

Far = Callable[[slice, torch.Tensor], torch.Tensor]
"""How far the student's logits `[n, V]` of some rows are from the teacher's: `[n]`."""


class Likeliest(NamedTuple):
    """What is kept of a teacher: of each place its likeliest tokens, at the temperature that it was asked at."""

    tokens: torch.Tensor
    """`[N, K]` int64."""
    log_probabilities: torch.Tensor
    """`[N, K + 1]`: of these, and of all others together."""


def of_teacher(states: torch.Tensor, head: torch.Tensor, kind: Divergence, temperature: float) -> Far:
    """From the teacher's states before its head, `[N, E]`, and that, `[V, E]`."""
    return lambda rows, logits: divergence((states[rows] @ head.T).float(), logits, kind, temperature)


def of_likeliest(kept: Likeliest, kind: Divergence, temperature: float) -> Far:
    """From the tokens that are kept of a teacher: all others count as one."""

    def far(rows: slice, logits: torch.Tensor) -> torch.Tensor:
        tokens, held = kept.tokens[rows], kept.log_probabilities[rows].float()
        ours = (logits / temperature).log_softmax(-1)
        rest = ours.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
        return temperature**2 * divergence(held, torch.cat([ours.gather(1, tokens), rest], 1), kind, 1.0)

    return far


def likeliest(logits: torch.Tensor, count: int, temperature: float) -> Likeliest:
    """Of logits `[N, V]` the K tokens to keep; fewer than V."""
    held = (logits.float() / temperature).log_softmax(-1)
    found = held.topk(min(count, held.shape[1] - 1))
    rest = held.scatter(1, found.indices, -torch.inf).logsumexp(1, keepdim=True)
    return Likeliest(found.indices, torch.cat([found.values, rest], 1).clamp(min=LEAST))


def held_to(
    states: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    far: Far,
    weight: torch.Tensor,
    size: torch.Tensor,
) -> torch.Tensor:
    """The sum of the module's loss, float32; gradients go to `states` and `head`.

    Args:
        states: `[N, D]`, of the token before each target.
        head: `[V, D]`, of the same dtype.
        targets: `[N]` int64.
        far: D.
        weight: w, `[N]`.
        size: by what each one's loss is multiplied, `[N]`.
    """
    total: torch.Tensor = _HeldTo.apply(states, head, targets, far, weight, size)  # type: ignore[no-untyped-call]
    return total


class _HeldTo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        far: Far,
        weight: torch.Tensor,
        size: torch.Tensor,
    ) -> torch.Tensor:
        needs_states, needs_head = ctx.needs_input_grad[:2]
        dstates = torch.empty_like(states) if needs_states else None
        dhead = torch.zeros(head.shape, dtype=torch.float32) if needs_head else None
        total = states.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(targets), CHUNK):
            rows = slice(begin, begin + CHUNK)
            logits = (states[rows] @ head.T).float().requires_grad_()
            with torch.enable_grad():
                own, theirs = F.cross_entropy(logits, targets[rows], reduction="none"), far(rows, logits)
                loss = (size[rows] * ((1 - weight[rows]) * own + weight[rows] * theirs)).sum()
                (dlogits,) = torch.autograd.grad(loss, logits)
            total += loss.detach()
            dlogits = dlogits.to(head.dtype)
            if dstates is not None:
                torch.mm(dlogits, head, out=dstates[rows])
            if dhead is not None:
                dhead += dlogits.T @ states[rows]
        ctx.save_for_backward(dstates, None if dhead is None else dhead.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by = float(gradient)
        found = [None if kept is None else kept * by for kept in ctx.saved_tensors]
        return (*found, *[None] * 4)
