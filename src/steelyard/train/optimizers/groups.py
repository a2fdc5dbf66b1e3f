"""Which parameters an optimizer treats alike: by kind, by depth, and as the configuration says by name."""

# Depth: 0 for what is above the last block, 1 for that block, and one more for each below it; the embedding is deepest.

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks|stages)\.(\d+)\.")
EMBEDDING = re.compile(r"embed")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|head|classifier)\.")


class GroupConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters that differ from the others."""

    match: str
    """A regular expression that is found in their names."""
    scale: float = 1.0
    """Of the learning rate; 0 freezes them."""
    weight_decay: float | None = None
    """Instead of the optimizer's."""


def depths(names: Mapping[str, Any]) -> dict[str, int]:
    """How far below the top each parameter is."""
    blocks = {name: int(found[1]) for name in names if (found := BLOCK.search(name))}
    count = max(blocks.values(), default=-1) + 1
    return {
        name: count - blocks[name] if name in blocks else count + 1 if EMBEDDING.search(name) else 0 for name in names
    }


def is_hidden_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Whether it maps hidden states to hidden states: no vector, no embedding, no head."""
    return tensor.ndim > 1 and not EMBEDDING.search(name) and not HEAD.search(name)


def split(
    parameters: Mapping[str, torch.Tensor],
    chosen: tuple[GroupConfig, ...],
    *,
    weight_decay: float,
    layer_decay: float,
    unfreeze_epochs: float,
) -> list[dict[str, Any]]:
    """Groups with their own `scale` (of the learning rate), `weight_decay`, `start` (epochs) and `matrices`.

    Args:
        parameters: by name.
        chosen: the configuration's; the first that matches a name counts.
        weight_decay: of matrices; vectors have none.
        layer_decay: factor of the learning rate for each block further down (Clark et al. 2020).
        unfreeze_epochs: a block begins to learn so many epochs after the one above it (Howard and Ruder 2018).
    """
    found: dict[tuple[float, float, float, bool], list[torch.Tensor]] = {}
    for name, depth in depths(parameters).items():
        tensor = parameters[name]
        special = next((group for group in chosen if re.search(group.match, name)), None)
        decay = weight_decay if tensor.ndim > 1 else 0.0
        if special is not None and special.weight_decay is not None:
            decay = special.weight_decay
        scale = layer_decay**depth * (1.0 if special is None else special.scale)
        key = (scale, decay, unfreeze_epochs * depth, is_hidden_matrix(name, tensor))
        found.setdefault(key, []).append(tensor)
    return [
        {"params": tensors, "scale": scale, "weight_decay": decay, "start": start, "matrices": matrices}
        for (scale, decay, start, matrices), tensors in found.items()
    ]
