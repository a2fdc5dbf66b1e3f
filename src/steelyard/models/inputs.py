"""What networks read: prepared examples, how much of a forward pass one takes, and how several become its tensors."""

# B rows  L longest row  C channels  S side of an image

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from steelyard.text.tokenizer import Tokenizer

PATCH = 64
"""Pixels of an image that count as much as a token."""


class Inputs(Protocol):
    """Of one kind of network."""

    def size(self, example: Any) -> int:
        """What an example takes in a forward pass: its tokens, patches or frames."""
        ...

    def batch(self, examples: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of a forward pass over some examples."""
        ...


@dataclass(frozen=True)
class TextInputs:
    """Token ids of a text; rows are padded on the right."""

    tokenizer: Tokenizer
    context: int | None
    """Most tokens of a row; None: any number."""

    def all_tokens(self, text: str) -> list[int]:
        """All of a text, however long; at least one token."""
        return self.tokenizer.encode_plain(text, add_special_tokens=True) or [0]

    def tokens(self, text: str) -> list[int]:
        """What the network reads of a text: no more than its context."""
        return self.all_tokens(text)[: self.context]

    def size(self, example: Any) -> int:
        """Tokens."""
        return len(example)

    def batch(self, examples: Sequence[Any]) -> tuple[Any, ...]:
        """Token ids `[B, L]` and lengths `[B]`."""
        return padded(examples)


@dataclass(frozen=True)
class ImageInputs:
    """An image `[C, S, S]` uint8."""

    channels: int
    """1: grey. 3: red, green, blue."""
    side: int

    def size(self, example: Any) -> int:
        """Blocks of 64 pixels."""
        return -(-self.side * self.side // PATCH)

    def batch(self, examples: Sequence[Any]) -> tuple[Any, ...]:
        """Images `[B, C, S, S]` uint8."""
        return (torch.stack(list(examples)),)


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids -> `[B, L]` int64, padded with 0 on the right, and lengths `[B]`."""
    lengths = torch.tensor([len(row) for row in rows])
    token_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(rows):
        token_ids[number, : len(row)] = torch.tensor(row)
    return token_ids, lengths
