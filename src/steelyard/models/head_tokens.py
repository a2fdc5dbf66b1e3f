"""Which tokens a draft's head has rows for. Its checkpoint has all of them, for every reader, and this file beside."""

# K tokens  V vocabulary

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError

FILE = "draft_tokens.json"
"""`{"tokens": [...]}`."""


def write(folder: Path, tokens: Sequence[int]) -> None:
    """Name the tokens of a draft, in order, in its checkpoint's folder."""
    (folder / FILE).write_text(json.dumps({"tokens": list(tokens)}) + "\n")


def read(folder: Path, vocabulary: int) -> torch.Tensor | None:
    """`[K]` int64, each once and in order; None: the checkpoint is no draft, or one for all tokens.

    Raises:
        CheckpointError: the file has something else, or tokens that there are not.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        kept = msgspec.convert(manifest.read_json(path).get("tokens"), list[int])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"'{path}' has no list of tokens: {error}") from None
    if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= vocabulary:
        raise CheckpointError(f"'{path}': tokens are numbers below {vocabulary}, each once, in order")
    return torch.tensor(kept)


class Head:
    """A head with rows for some tokens alone, as a loss sees it.

    Args:
        tokens: `[K]`.
        vocabulary: V.
    """

    def __init__(self, tokens: torch.Tensor, vocabulary: int) -> None:
        self._tokens = tokens
        self._places = torch.full((vocabulary,), -1).index_copy_(0, tokens, torch.arange(len(tokens)))

    def rows(self, head: torch.Tensor) -> torch.Tensor:
        """`[V, D]` -> `[K, D]`."""
        return head.index_select(0, self._tokens)

    def known(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of targets `[N]` which ones it has, `[M]` int64, and the rows that they are, `[M]`."""
        places = self._places[targets]
        there = (places >= 0).nonzero().flatten()
        return there, places[there]
