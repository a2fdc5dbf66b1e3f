"""Exact duplicates removed, and a seeded split with no text in both parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from steelyard.data.rows import Conversation
from steelyard.errors import ConfigError

Row = TypeVar("Row")


def remove_duplicates(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The first of every set of exact duplicates, in their order."""
    first: dict[Hashable, Conversation] = {}
    for conversation in conversations:
        first.setdefault(conversation.key, conversation)
    return list(first.values())


def split(
    conversations: Sequence[Conversation], holdout: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Part rows at random into those to learn from and `holdout` others, by their texts. Raises as `parted` does."""
    return parted(conversations, lambda conversation: conversation.prompt_key, holdout, seed)


def parted(rows: Sequence[Row], key: Callable[[Row], Hashable], holdout: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Part rows at random into those to learn from and `holdout` others.

    Rows with the same text (whatever was answered) stay together, so that no text is in both parts; the second part
    may therefore fall short of `holdout` by less than the smallest such group of the first.

    Raises:
        ConfigError: more to hold out than there is.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    if not 0 <= holdout < len(rows):
        raise ConfigError(f"cannot hold out {holdout} of {len(rows)} rows: hold out fewer")
    keys = list(groups)
    order = np.random.Generator(np.random.Philox(seed % 2**64)).permutation(len(keys))
    kept: list[Row] = []
    held: list[Row] = []
    for index in order:
        group = groups[keys[index]]
        (held if len(held) + len(group) <= holdout else kept).extend(group)
    return kept, held
