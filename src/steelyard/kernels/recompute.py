"""What is cheap to make is not kept for the backward pass, but made again (Korthikanti et al. 2022, section 5).

A function that is worth it marks what it returns; inside `recomputing` whatever would save such a tensor saves how it
is made instead. Its inputs are kept for the function's own gradient anyway, so nothing more is kept than without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

MADE_BY = "made_by"
"""The attribute of a marked tensor."""


def remake(made: torch.Tensor, again: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`made`, marked: `again` makes the same bits from what lives as long as the graph does."""
    if made.requires_grad:
        setattr(made, MADE_BY, again)
    return made


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Graphs that are built in this block keep no marked tensor."""
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(tensor: torch.Tensor) -> Any:
    return getattr(tensor, MADE_BY, tensor)


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    with torch.no_grad():
        made: torch.Tensor = packed()
    return made
