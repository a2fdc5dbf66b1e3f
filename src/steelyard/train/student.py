"""A decoder that learns from another with the same vocabulary what that holds of every next token.

To the loss of `soft_targets.py`, over the tokens that are trained, come on demand h (1 - cos(s, t)) of the states
before both heads and after some blocks. Some answers may be the student's own, drawn from it as it is by now, of which
the teacher alone says what to hold (Agarwal et al. 2024): so it learns to go on from what it says itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from steelyard.data.packing import Pack, pack
from steelyard.data.rows import TokenRow
from steelyard.kernels.recompute import recomputing
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.train import soft_targets
from steelyard.train.config import DistillConfig
from steelyard.train.language_model import LanguageModelling
from steelyard.train.soft_targets import Far, Likeliest

BEGINNING = 32
"""Tokens of a row after which a student goes on where nothing is asked, half of the row at most."""


class Memory(Protocol):
    """What is kept of a teacher that was asked before."""

    def of(self, rows: Sequence[int]) -> Likeliest:
        """Of the trained tokens of some rows, one after the other."""
        ...


class Writer(Protocol):
    """Goes on as the student does."""

    def __call__(self, prompts: Sequence[list[int]], tokens: Sequence[int], seed: int) -> list[list[int]]:
        """Of each prompt how it goes on, by so many tokens at most."""
        ...


class _Counted(NamedTuple):
    """Rows to learn from, and of each trained token the teacher's share and what it counts."""

    rows: list[TokenRow]
    weight: torch.Tensor
    size: torch.Tensor


class Student(LanguageModelling):
    """See `Task`.

    Args:
        language_modelling: see `LanguageModelling`.
        teacher: of the same vocabulary, which stays as it is; or what it said of the rows.
        how: the shares of the loss. `hidden` and `own` need a teacher that can be asked, `hidden` one as wide.
        writer: what `own` needs.
    """

    def __init__(
        self, *language_modelling: Any, teacher: Decoder | Memory, how: DistillConfig, writer: Writer | None = None
    ) -> None:
        super().__init__(*language_modelling)
        self.teacher, self._how, self._writer = teacher, how, writer

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """See the module; nats, summed."""
        counted = self._counted(rows)
        batch = pack(counted.rows)
        head, places, targets = self.decoder.lm_head.weight, batch.places, batch.targets
        there = torch.arange(len(targets))
        if self._head is not None:
            there, targets = self._head.known(targets)
            places, head = places[there], self._head.rows(head)
        theirs, far = self._ask(rows, batch, places, there)
        with _after_blocks(self.decoder, self._how.layers) as after, recomputing():
            given = batch.token_ids, batch.positions, PackedAttention(batch.lengths)
            states = [self.decoder(*given, self.adapter)]
        states = [kept.index_select(0, places) for kept in (*states, *after)]
        loss = soft_targets.held_to(states[0], head, targets, far, counted.weight[there], counted.size[there])
        for ours, other in zip(states, theirs, strict=True) if self._how.hidden else ():
            apart = 1 - F.cosine_similarity(ours.float(), other.float(), dim=-1)
            loss = loss + self._how.hidden * (counted.size[there] * apart).sum()
        return loss

    def _ask(
        self, rows: Sequence[int], batch: Pack, places: torch.Tensor, there: torch.Tensor
    ) -> tuple[list[torch.Tensor], Far]:
        """The teacher's states at some places, before its head and after blocks; how far logits are from its own."""
        how = self._how.divergence, self._how.temperature
        if not isinstance(self.teacher, Decoder):
            kept = self.teacher.of(rows)
            return [], soft_targets.of_likeliest(Likeliest(*(part[there] for part in kept)), *how)
        with torch.no_grad(), _after_blocks(self.teacher, self._how.layers) as after:
            last = self.teacher(batch.token_ids, batch.positions, PackedAttention(batch.lengths))
        head = self.teacher.lm_head.weight
        theirs = [kept.index_select(0, places) for kept in (last, *after)]
        return theirs, soft_targets.of_teacher(theirs[0], head if self._head is None else self._head.rows(head), *how)

    def _counted(self, rows: Sequence[int]) -> _Counted:
        """Rows as they are, and some with an answer of the student's own, which counts as much as the row's."""
        learnt = [self._rows[row] for row in rows]
        weight, size = [self._how.weight] * len(rows), [1.0] * len(rows)
        if self._how.own:
            assert self._writer is not None, "see the class"
            drawn, seed = torch.rand(len(rows)), int(torch.randint(1 << 62, ()))
            chosen = [place for place in range(len(rows)) if drawn[place] < self._how.own]
            begun = [beginning(learnt[place]) for place in chosen]
            room = [len(learnt[place].tokens) - len(prompt) for place, prompt in zip(chosen, begun, strict=True)]
            written = self._writer(begun, room, seed) if chosen else []
            for place, prompt, answer in zip(chosen, begun, written, strict=True):
                if answer:
                    weight[place], size[place] = 1.0, learnt[place].targets / len(answer)
                    trained = [False] * len(prompt) + [True] * len(answer)
                    learnt[place] = TokenRow(tokens=prompt + answer, trained=trained)
        counts = torch.tensor([row.targets for row in learnt])
        return _Counted(
            learnt, torch.tensor(weight).repeat_interleave(counts), torch.tensor(size).repeat_interleave(counts)
        )


def beginning(row: TokenRow) -> list[int]:
    """What a row asks: all before its last answer; of a text its first tokens."""
    last = len(row.trained) - row.trained[::-1].index(True)
    answer = next((place + 1 for place in range(last - 1, -1, -1) if not row.trained[place]), 0)
    return row.tokens[: answer if answer > 1 else max(1, min(BEGINNING, len(row.tokens) // 2))]


@contextmanager
def _after_blocks(decoder: Decoder, count: int) -> Iterator[list[torch.Tensor]]:
    """The states after so many blocks, evenly over a decoder, without its last: filled by a pass in the context."""
    found: list[torch.Tensor] = []

    def keep(block: nn.Module, given: object, states: torch.Tensor) -> None:
        found.append(states)

    total = len(decoder.model.layers)
    places = [round(number * total / (count + 1)) - 1 for number in range(1, count + 1)]
    hooks = [decoder.model.layers[place].register_forward_hook(keep) for place in places]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
