"""What is cheap to make is not kept for the backward pass, but made again (Korthikanti et al. 2022, section 5).

A function that is worth it marks what it returns; inside `recomputing` whatever would save such a tensor saves how it
is made instead. Its inputs are kept for the function's own gradient anyway, so nothing more is kept than without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
    packed = getattr(tensor, MADE_BY, tensor)
    for note in _observers:
        if packed is tensor:
            note(tensor)
    return packed


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    with torch.no_grad():
        made: torch.Tensor = packed()
    return made


def kept_bytes(forward: Callable[[], torch.Tensor], besides: Sequence[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, which is not made; each storage once.

    Args:
        forward: builds the graph.
        besides: tensors that are there anyway; a module's parameters need not be named.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        whole = tensor if tensor._base is None else tensor._base
        if storage.data_ptr() not in known and not isinstance(whole, torch.nn.Parameter):
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _observed(note), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
        del result  # storages lived up to here, so that no two had one place
    return sum(found.values())


_observers: list[Callable[[torch.Tensor], torch.Tensor]] = []


@contextlib.contextmanager
def _observed(note: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """`note` hears of what `recomputing` keeps, too, which hides it from hooks around it."""
    _observers.append(note)
    try:
        yield
    finally:
        _observers.remove(note)
