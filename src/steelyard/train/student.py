"""A decoder that learns from a larger one with the same vocabulary what that holds of every next token.

loss = (1 - w) CE(token) + w T^2 D(p, q), as in `distillation.py`, over the tokens that are trained; on demand also
h (1 - cos(s, t)) of the states before both heads. Logits of both are made some rows at a time, and with them the
gradients, so that neither the one's nor the other's are ever all in memory.
"""

# N trained tokens  D, E widths of student and teacher  V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from steelyard.data.packing import pack
from steelyard.kernels.recompute import recomputing
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.train.distillation import Divergence, divergence
from steelyard.train.language_model import LanguageModelling

CHUNK = 256
"""Rows of logits in memory at a time, some six times over."""


class Student(LanguageModelling):
    """See `Task`.

    Args:
        language_modelling: see `LanguageModelling`.
        teacher: of the same vocabulary; stays as it is.
        weight: w, above 0, at most 1.
        temperature: T.
        kind: see `distillation.divergence`.
        hidden: h, at least 0; both are equally wide where it is more.
    """

    def __init__(
        self,
        *language_modelling: Any,
        teacher: Decoder,
        weight: float,
        temperature: float,
        kind: Divergence,
        hidden: float = 0.0,
    ) -> None:
        super().__init__(*language_modelling)
        self.teacher, self._how, self._hidden = teacher, (weight, temperature, kind), hidden

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """See the module; nats, summed."""
        batch = pack([self._rows[row] for row in rows])
        given, places, targets = (batch.token_ids, batch.positions), batch.places, batch.targets
        head, their_head = self.decoder.lm_head.weight, self.teacher.lm_head.weight
        if self._head is not None:
            there, targets = self._head.known(targets)
            places, head, their_head = places[there], self._head.rows(head), self._head.rows(their_head)
        with torch.no_grad():
            theirs = self.teacher(*given, PackedAttention(batch.lengths)).index_select(0, places)
        with recomputing():
            states = self.decoder(*given, PackedAttention(batch.lengths), self.adapter).index_select(0, places)
        loss = held_to(states, head, theirs, their_head, targets, *self._how)
        if self._hidden:
            loss = loss + self._hidden * (1 - F.cosine_similarity(states.float(), theirs.float(), dim=-1)).sum()
        return loss


def held_to(
    states: torch.Tensor,
    head: torch.Tensor,
    teacher_states: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
    weight: float,
    temperature: float,
    kind: Divergence,
) -> torch.Tensor:
    """The sum of the module's loss, float32; gradients go to `states` and `head`.

    Args:
        states: `[N, D]`, of the token before each target.
        head: `[V, D]`, of the same dtype.
        teacher_states: `[N, E]`.
        teacher_head: `[V, E]`.
        targets: `[N]` int64.
        weight: w.
        temperature: T.
        kind: D.
    """
    total: torch.Tensor = _HeldTo.apply(  # type: ignore[no-untyped-call]
        states, head, teacher_states, teacher_head, targets, weight, temperature, kind
    )
    return total


class _HeldTo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        head: torch.Tensor,
        teacher_states: torch.Tensor,
        teacher_head: torch.Tensor,
        targets: torch.Tensor,
        weight: float,
        temperature: float,
        kind: Divergence,
    ) -> torch.Tensor:
        needs_states, needs_head = ctx.needs_input_grad[:2]
        dstates = torch.empty_like(states) if needs_states else None
        dhead = torch.zeros(head.shape, dtype=torch.float32) if needs_head else None
        total = states.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(targets), CHUNK):
            rows = slice(begin, begin + CHUNK)
            theirs = (teacher_states[rows] @ teacher_head.T).float()
            logits = (states[rows] @ head.T).float().requires_grad_()
            with torch.enable_grad():
                own = F.cross_entropy(logits, targets[rows], reduction="none")
                loss = ((1 - weight) * own + weight * divergence(theirs, logits, kind, temperature)).sum()
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
        return (*found, *[None] * 6)
