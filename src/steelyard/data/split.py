"""Exact duplicates removed, and a seeded split with no text in both parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from steelyard.data.rows import Conversation
from steelyard.errors import ConfigError

Row = TypeVar("Row")
Digests = npt.NDArray[np.bytes_]
"""`[N]` of 16 bytes each, of N rows."""
Mask = npt.NDArray[np.bool_]


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


def first_of_each(digests: Digests) -> Mask:
    """`[N]`: which rows are the first of their digest, as `remove_duplicates` keeps them."""
    first = np.zeros(len(digests), np.bool_)
    first[np.unique(digests, return_index=True)[1]] = True
    return first


def held_out(digests: Digests, holdout: int, seed: int) -> Mask:
    """`[N]`: which rows `parted` would hold out, if their keys have these digests. Raises as `parted` does."""
    if not 0 <= holdout < len(digests):
        raise ConfigError(f"cannot hold out {holdout} of {len(digests)} rows: hold out fewer")
    if not holdout:
        return np.zeros(len(digests), np.bool_)
    _, first, group, sizes = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    in_order = np.argsort(first)  # groups, as their first rows stand
    chosen = np.zeros(len(sizes), np.bool_)
    held = 0
    for index in np.random.Generator(np.random.Philox(seed % 2**64)).permutation(len(sizes)):
        size = int(sizes[in_order[index]])
        if held + size <= holdout:
            chosen[in_order[index]] = True
            held += size
        if held == holdout:
            break
    found: Mask = chosen[group]
    return found
