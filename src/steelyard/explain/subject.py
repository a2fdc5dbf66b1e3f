"""What is explained: a network, an input, and one thing that it says of it. What methods need to know of these.

An input is made of **units**, such as the tokens of a text or the patches of an image: what is told is their share in
the **value**, a figure in log-odds. Whatever is not theirs, such as what stands around every text, is the rest. Work
comes in pieces of some milliseconds: an engine that explains serves others in between.
"""

# R rows  U units  C classes

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

PIECE = 512
"""Tokens of a piece of work, unless one row has more."""
T = TypeVar("T")
Steps = Generator[None, None, T]
"""Yields after every piece of work, and returns what came of it."""


def at_once(steps: Steps[T]) -> T:
    """All of it, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def log_odds(logits: torch.Tensor, target: int) -> torch.Tensor:
    """Logits `[R, C]` -> how far the target's is above the mean of the others', `[R]`; of two classes the log-odds."""
    others = (logits.sum(-1) - logits[:, target]) / (logits.shape[-1] - 1)
    return logits[:, target] - others


@dataclass(frozen=True)
class Taken:
    """What a network read, as numbers, and the value's gradient there."""

    inputs: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]
    """Of the same shapes."""
    bases: tuple[torch.Tensor, ...]
    """What nothing is, of shapes that spread to theirs: the mean embedding, the middle of what images hold."""
    value: float


class Subject(Protocol):
    """See the module."""

    units: int
    baseline: str
    """What is there instead of a unit that is taken away, in words."""
    computed: int
    """Tokens (patches, frames) that have gone through the network so far; through the backward pass twice more."""

    def taken(self, *, rules: bool = False, share: float = 1.0) -> Steps[Taken]:
        """Inputs and gradients, by the rules of relevance or plain, anywhere from nothing (0) to all that was read."""
        ...

    def spread(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Figures of the shapes of `Taken.inputs` -> their sums `[U + 1]` by unit, the rest last, float64."""
        ...

    def likelihood(self, kept: torch.Tensor) -> Steps[torch.Tensor]:
        """Log-probability `[R]` of what is explained where only some units `[R, U]` bool are there; float64."""
        ...


def on_the_way(x: torch.Tensor, base: torch.Tensor, share: float) -> torch.Tensor:
    """`x` at a share of the way from `base`; no gradient passes."""
    return (x if share == 1 else base + share * (x - base)).detach()


class Watch(TorchFunctionMode):
    """Takes hold of what a network reads: the embeddings of given tokens, what a first convolution reads.

    Args:
        token_ids: as the network gets them, the very tensor; None: none.
        share: how far it is on the way from nothing, which is the mean embedding, and zero of a convolution.
    """

    def __init__(self, token_ids: torch.Tensor | None, share: float) -> None:
        super().__init__()
        self.leaves: list[torch.Tensor] = []
        self.bases: list[torch.Tensor] = []
        self._token_ids, self._share = token_ids, share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """As torch would, but for what is read."""
        named = kwargs or {}
        if func is F.embedding and args[0] is self._token_ids:
            return self._leaf(func(*args, **named), args[1].mean(0))
        if func in (torch.conv1d, torch.conv2d) and not args[0].requires_grad:
            return func(self._leaf(args[0], torch.zeros(1)), *args[1:], **named)
        return func(*args, **named)

    def _leaf(self, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        leaf = on_the_way(x, base, self._share).requires_grad_()
        self.leaves.append(leaf)
        self.bases.append(base)
        return leaf
