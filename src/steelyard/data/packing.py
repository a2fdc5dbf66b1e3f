"""Rows side by side in one flat pack, without padding and without seeing each other."""

# T tokens of the pack  N trained tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steelyard.data.rows import TokenRow

LIKE = 0.75
"""Of a group's longest row: shorter ones begin another group,"""
ENOUGH = 512
"""if it has so many tokens already: fewer would leave a product's columns idle."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A forward pass's worth of rows."""

    token_ids: torch.Tensor
    """`[T]` int64."""
    positions: torch.Tensor
    """`[T]` int64, from 0 in each row."""
    lengths: list[int]
    """Tokens of each row."""
    places: torch.Tensor
    """`[N]` int64: where in the pack the hidden state stands that predicts each trained token."""
    targets: torch.Tensor
    """`[N]` int64: the trained tokens."""


def pack(rows: Sequence[TokenRow]) -> Pack:
    """Lay rows side by side."""
    tokens = [token for row in rows for token in row.tokens]
    trained = torch.tensor([flag for row in rows for flag in row.trained], dtype=torch.bool)
    token_ids = torch.tensor(tokens, dtype=torch.int64)
    where = trained.nonzero().flatten()
    return Pack(
        token_ids=token_ids,
        positions=torch.cat([torch.arange(len(row.tokens)) for row in rows]),
        lengths=[len(row.tokens) for row in rows],
        places=where - 1,
        targets=token_ids[where],
    )


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of rows, grouped so that no group exceeds `capacity` tokens (a longer row stands alone).

    First fit, longest first (Johnson 1973: at most 11/9 of the best number of groups, and a constant).
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        for index, free in enumerate(room):
            if lengths[row] <= free:
                groups[index].append(row)
                room[index] -= lengths[row]
                break
        else:
            groups.append([row])
            room.append(max(0, capacity - lengths[row]))
    return groups


def stacks(lengths: Sequence[int], capacity: int, *, whole: bool = False) -> list[list[int]]:
    """Places of rows of like length, grouped so that no group exceeds `capacity` when all are padded to its longest
    (a longer row stands alone), and that little of a group is padding; `whole`: as few groups as can be.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):  # a group's first is its longest
        longest, count = (lengths[groups[-1][0]], len(groups[-1])) if groups else (0, 0)
        shorter = not whole and lengths[row] < LIKE * longest and longest * count >= ENOUGH
        if not groups or shorter or longest * (count + 1) > capacity:
            groups.append([row])
        else:
            groups[-1].append(row)
    return groups
