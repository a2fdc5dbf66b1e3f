"""Which weights go, by their scores: a share of a row, a layer or a whole model, or some of every few (N:M)."""

# N outputs  M inputs

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from steelyard.errors import ConfigError


class Pattern(NamedTuple):
    """Of every `of` weights of a row that lie side by side, `kept` stay."""

    kept: int
    of: int


def pattern(text: str) -> Pattern:
    """`2:4` and the like.

    Raises:
        ConfigError: something else.
    """
    found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise ConfigError(f"pattern '{text}': give two numbers, such as 2:4, the first one smaller")
    return Pattern(int(found[1]), int(found[2]))


def lowest(scores: torch.Tensor, rate: float) -> torch.Tensor:
    """Scores `[..., K]` -> bool, True at the share `rate` that is lowest along the last dimension; of equal ones the
    first go.
    """
    going = torch.zeros(scores.shape, dtype=torch.bool)
    count = round(rate * scores.shape[-1])
    order = scores.argsort(dim=-1, stable=True)
    return going.scatter_(-1, order[..., :count], True)


def lowest_of_layer(scores: torch.Tensor, rate: float) -> torch.Tensor:
    """The same over all of a layer's scores `[N, M]` at once."""
    return lowest(scores.flatten(), rate).view(scores.shape)


def lowest_of_all(scores: Mapping[str, torch.Tensor], rate: float) -> dict[str, torch.Tensor]:
    """The same over all layers at once."""
    together = lowest(torch.cat([layer.flatten() for layer in scores.values()]), rate)
    parts = together.split([layer.numel() for layer in scores.values()])  # type: ignore[no-untyped-call]
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def lowest_of_few(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Scores `[N, M]` -> bool, True at the lowest `of - kept` of every `of` of a row.

    Raises:
        ConfigError: a row's length is no multiple of `of`.
    """
    if scores.shape[-1] % pattern.of:
        raise ConfigError(f"pattern {pattern.kept}:{pattern.of}: {scores.shape[-1]} inputs are no multiple of it")
    few = scores.view(*scores.shape[:-1], -1, pattern.of)
    return lowest(few, 1 - pattern.kept / pattern.of).flatten(-2)
