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
    window: int | None = None
    """Longer texts are read in parts of so many tokens, and what is said of each is averaged; None: they are cut."""

    def windows(self, tokens: Sequence[int]) -> list[list[int]]:
        """All tokens of a text -> what the network reads of it: one row, or several that are no longer than a window,
        each with the tokens that stand around every text.
        """
        if self.window is None or len(tokens) <= self.window:
            return [list(tokens[: self.context])]
        before, after = around(self.tokenizer)
        text = tokens[len(before) : len(tokens) - len(after)]
        step = max(1, self.window - len(before) - len(after))
        return [[*before, *text[begin : begin + step], *after] for begin in range(0, len(text), step)]

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


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and behind every text, such as [CLS] and [SEP]."""
    both = tokenizer.encode_plain("", add_special_tokens=True)
    return both[: len(both) // 2], both[len(both) // 2 :]


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
        before, after = around(self.tokenizer)
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


class Fused(msgspec.Struct, frozen=True):
    """An example of several kinds; None: it has none of that kind."""

    tokens: list[int] | None
    image: torch.Tensor | None
    """`[C, S, S]` uint8."""
    features: torch.Tensor | None
    """`[M, F]`."""

    @property
    def empty(self) -> bool:
        """Whether it has nothing at all."""
        return self.tokens is None and self.image is None and self.features is None

    def only(self, kept: Sequence[str]) -> Fused:
        """The same with some of `text`, `image`, `audio` alone."""
        return Fused(
            self.tokens if "text" in kept else None,
            self.image if "image" in kept else None,
            self.features if "audio" in kept else None,
        )


@dataclass(frozen=True)
class FusedInputs:
    """Texts, images and sounds, as many of these as a network has towers for."""

    text: TextInputs | None
    image: ImageInputs | None
    bands: int | None
    """Of sound."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Which there are, in the order of the towers."""
        there = (("text", self.text), ("image", self.image), ("audio", self.bands))
        return tuple(name for name, inputs in there if inputs is not None)

    def size(self, example: Any) -> int:
        """Tokens, blocks of 64 pixels and fiftieths of a second."""
        tokens = len(example.tokens or ())
        blocks = self.image.size(None) if self.image is not None else 0
        return tokens + blocks + (0 if example.features is None else example.features.shape[-1] // 2)

    def batch(self, examples: Sequence[Any]) -> tuple[Any, ...]:
        """What each has `[B, modalities]` bool, then for each tower its arguments, nothing where there is nothing."""
        present: list[list[bool]] = []
        given: list[tuple[torch.Tensor, ...]] = []
        if self.text is not None:
            present.append([bool(example.tokens) for example in examples])
            given.append(padded([example.tokens or [0] for example in examples]))
        if self.image is not None:
            present.append([example.image is not None for example in examples])
            white = torch.full((self.image.channels, self.image.side, self.image.side), 255, dtype=torch.uint8)
            given.append((torch.stack([white if each.image is None else each.image for each in examples]),))
        if self.bands is not None:
            present.append([example.features is not None for example in examples])
            silence = torch.zeros(self.bands, 8)
            given.append(padded_features([silence if each.features is None else each.features for each in examples]))
        return torch.tensor(present).T, *given


def padded_features(features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of rows, each `[M, F]` -> `[B, M, F]` with 0 behind each, and the frames `[B]` of each."""
    frames = torch.tensor([row.shape[-1] for row in features])
    joined = torch.zeros(len(features), features[0].shape[0], int(frames.max()))
    for number, row in enumerate(features):
        joined[number, :, : row.shape[-1]] = row
    return joined, frames


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids -> `[B, L]` int64, padded with 0 on the right, and lengths `[B]`."""
    lengths = torch.tensor([len(row) for row in rows])
    token_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(rows):
        token_ids[number, : len(row)] = torch.tensor(row)
    return token_ids, lengths
