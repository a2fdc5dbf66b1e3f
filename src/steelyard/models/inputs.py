"""What networks read: prepared examples, how much of a forward pass one takes, and how several become its tensors."""

# B rows  L longest row  C channels  S side of an image

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
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


class Sentence(msgspec.Struct, frozen=True):
    """A sentence of words, as a tagger reads it."""

    tokens: list[int]
    places: list[int]
    """Where each word begins among the tokens."""
    shapes: list[int]
    """Of each token: how its word is written; 0 for tokens of no word."""


@dataclass(frozen=True)
class WordInputs:
    """Words as token ids, with how each is written: a tokenizer that lowers letters does not tell names from words."""

    tokenizer: Tokenizer
    context: int | None

    def sentence(self, words: Sequence[str]) -> Sentence:
        """All of a sentence, however long."""
        around = self.tokenizer.encode_plain("", add_special_tokens=True)
        before, after = around[: len(around) // 2], around[len(around) // 2 :]  # [CLS] and [SEP]
        made = Sentence([*before], [], [0] * len(before))
        for word in words:
            pieces = self._pieces(word)
            made.places.append(len(made.tokens))
            made.tokens.extend(pieces)
            made.shapes.extend([shape(word)] * len(pieces))
        made.tokens.extend(after)
        made.shapes.extend([0] * len(after))
        return made

    def _pieces(self, word: str) -> list[int]:
        return self.tokenizer.encode_plain(word) or self.tokenizer.encode_plain("?")

    def size(self, example: Any) -> int:
        """Tokens."""
        return len(example.tokens)

    def batch(self, examples: Sequence[Any]) -> tuple[Any, ...]:
        """Token ids `[B, L]`, lengths `[B]`, shapes `[B, L]`, and where words begin in the flat `[B * L]`: `[N]`."""
        token_ids, lengths = padded([example.tokens for example in examples])
        shapes, _ = padded([example.shapes for example in examples])
        width = token_ids.shape[1]
        places = [row * width + place for row, example in enumerate(examples) for place in example.places]
        return token_ids, lengths, shapes, torch.tensor(places)


SHAPES = 8


def shape(word: str) -> int:
    """How a word is written, as a number from 1: small, Capital, ALL CAPITALS, miXed, 12, a-b, other."""
    if word.islower():
        return 6 if "-" in word else 1
    if word.isupper():
        return 3 if len(word) > 1 else 7
    if word[:1].isupper():
        return 2 if word[1:].islower() else 4
    if any(letter.isdigit() for letter in word):
        return 5
    return 4 if any(letter.isalpha() for letter in word) else 0


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
