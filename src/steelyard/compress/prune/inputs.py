"""What linear layers see while calibration data pass: sums over their inputs, by which weights are judged."""

# M inputs  T tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Seen:
    """Of one layer.

    Args:
        size: M.
        products: whether sums of products are kept, too, and not of squares alone.
    """

    def __init__(self, size: int, products: bool) -> None:
        self.squares = torch.zeros(size)
        """`[M]`: sum of x^2."""
        self.gram = torch.zeros(size, size) if products else None
        """`[M, M]`: sum of x x^T."""

    def add(self, x: torch.Tensor) -> None:
        """Inputs `[..., M]`."""
        rows = x.detach().flatten(0, -2).float()
        if self.gram is None:
            self.squares += rows.square().sum(0)
        else:
            self.gram.addmm_(rows.T, rows)
            self.squares = self.gram.diagonal()


@contextmanager
def watching(layers: Mapping[str, nn.Linear], products: bool) -> Iterator[dict[str, Seen]]:
    """Record what some linear layers see while the block runs."""
    seen = {name: Seen(layer.in_features, products) for name, layer in layers.items()}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, inputs: seen[name].add(inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
