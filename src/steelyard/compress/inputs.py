"""Calibration data on their way through a decoder, and what is recorded of what its linear layers see of them."""

# M inputs  T tokens  D model width

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from steelyard.data.packing import Pack
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder


def dense(decoder: Decoder) -> bool:
    """Whether all its weights are plain numbers."""
    return all(tensor.is_floating_point() for tensor in decoder.buffers())


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by their names in a module."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


class Record(Protocol):
    """Of one layer."""

    def add(self, x: torch.Tensor) -> None:
        """Inputs `[..., M]`."""
        ...


R = TypeVar("R", bound=Record)


class Products:
    """Sums over a layer's inputs, by which its weights are judged.

    Args:
        size: M.
        whole: whether sums of all products are kept, and not of squares alone.
        even: every token counts for the same, its x made as long as the root of M: the first token of a row has a
            thousand times what others have, and would decide alone.
    """

    def __init__(self, size: int, whole: bool, *, even: bool = False) -> None:
        self._even = even
        self.squares = torch.zeros(size)
        """`[M]`: sum of x^2."""
        self.gram = torch.zeros(size, size) if whole else None
        """`[M, M]`: sum of x x^T."""

    def add(self, x: torch.Tensor) -> None:
        """See `Record`."""
        rows = x.detach().flatten(0, -2).float()
        if self._even:
            rows = F.normalize(rows, dim=-1) * math.sqrt(rows.shape[1])
        if self.gram is None:
            self.squares += rows.square().sum(0)
        else:
            self.gram.addmm_(rows.T, rows)
            self.squares = self.gram.diagonal()


class Magnitudes:
    """How large a layer's inputs are, channel by channel.

    Args:
        lengths: of the rows of each batch, in the order in which they pass.
    """

    def __init__(self, lengths: Iterable[Sequence[int]]) -> None:
        self._lengths = iter(lengths)
        self._largest: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """See `Record`."""
        rows = torch.split(x.detach().abs(), list(next(self._lengths)))
        self._largest += [row.amax(0) for row in rows]

    def typical(self) -> torch.Tensor:
        """`[M]` float32: the largest of a row, the median over rows."""
        return torch.stack(self._largest).float().median(0).values


@contextmanager
def watching(layers: Mapping[str, nn.Linear], record: Callable[[nn.Linear], R]) -> Iterator[dict[str, R]]:
    """Record what some linear layers see while the block runs."""
    seen = {name: record(layer) for name, layer in layers.items()}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, inputs: seen[name].add(inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Passing:
    """Batches that go through a decoder's blocks, one block after the other.

    Args:
        decoder: whose blocks.
        batches: calibration data.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Pack]) -> None:
        self._arguments = [(decoder.rotary(batch.positions), PackedAttention(batch.lengths), None) for batch in batches]
        self.states: list[torch.Tensor] = [decoder.embed(batch.token_ids) for batch in batches]
        """`[T, D]` each: what goes into the next block."""

    def through(self, block: nn.Module) -> list[torch.Tensor]:
        """What comes out of a block."""
        return [block(x, *arguments) for x, arguments in zip(self.states, self._arguments, strict=True)]
