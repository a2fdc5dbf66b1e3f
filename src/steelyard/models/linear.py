"""Linear layers and embeddings whose weights are int8 or int4, with int8 activations made on the fly.

Scales are per output channel and per token, or per group of inputs of both. What is summed under one scale is an exact
integer, and groups are added in order, so every way to compute the products agrees to the bit at every number of rows.
"""

# T tokens  N outputs  M inputs  G groups of inputs  V vocabulary  D model width

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from steelyard.kernels.library import load
from steelyard.kernels.onednn import ExactProduct
from steelyard.kernels.reference import LANES, grouped_product, quantize_groups, quantize_rows
from steelyard.kernels.rounded_product import RoundedProduct
from steelyard.kernels.steps import MOST_INPUTS

HALVES = 8
"""int4 weights to an int32."""


def packed_halves(weight: torch.Tensor) -> torch.Tensor:
    """`[N, M]` int8 in -8..7 -> `[N, M / 8]` int32, each plus 8, the first in the lowest four bits.

    The layout of compressed-tensors' `pack-quantized`.
    """
    shifts = torch.arange(0, 32, 4)
    wide = (weight.long() + 8).view(len(weight), -1, HALVES) << shifts
    whole = wide.sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def unpacked_halves(packed: torch.Tensor) -> torch.Tensor:
    """The other way."""
    low = packed.contiguous().view(torch.uint8)  # the first byte holds the first two: little-endian
    both = torch.stack([low & 15, low >> 4], dim=-1)
    return both.flatten(1).to(torch.int8) - 8


class QuantizedWeight(nn.Module):
    """Integers and their scales.

    Args:
        weight: `[N, M]` int8, or int4 as `packed_halves` has them.
        weight_scale: `[N, G]`, any float dtype.
        dtype: of the outputs.
    """

    def __init__(self, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.weight_scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.dtype = dtype

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.weight.dtype == torch.int8 else 4

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """M."""
        return self.weight.shape[1] * (1 if self.bits == 8 else HALVES)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.weight_scale.shape[1]

    def values(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """`[N, M]` int8; of `rows` `[R]` int64 only: `[R, M]`."""
        weight = self.weight if rows is None else self.weight[rows]
        return weight if self.bits == 8 else unpacked_halves(weight)

    def numbers(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """`[N, M]` float32: what the integers stand for; of `rows` `[R]` int64 only: `[R, M]`."""
        scales = (self.weight_scale if rows is None else self.weight_scale[rows]).float()
        return (self.values(rows).float().view(*scales.shape, -1) * scales[..., None]).flatten(-2)


class QuantizedLinear(QuantizedWeight):
    """A linear layer with integer weights and activations.

    Args:
        weight: see `QuantizedWeight`.
        weight_scale: `[N, G]`.
        bias: `[N]` or None, added in float32.
        dtype: of the outputs.
    """

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(weight, weight_scale, dtype)
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias)
        self._product: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., M]` float -> `[..., N]` in `dtype`."""
        if self._product is None:
            self._product = self._made()
        outputs = self._product(x.reshape(-1, x.shape[-1]))
        if self.bias is not None:
            outputs = outputs + self.bias.float()
        return outputs.to(self.dtype).view(*x.shape[:-1], -1)

    def _made(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Rows `[T, M]` -> `[T, N]` float32: by the native kernels, or in PyTorch with the same bits."""
        kernels = load()
        whole = self.weight_scale.shape[1] == 1
        if kernels is not None and (whole or self.group % LANES == 0) and self.in_features <= MOST_INPUTS:
            return RoundedProduct(self.values(), self.weight_scale, self.bits, kernels)
        if self.bits == 8 and whole:
            exact = ExactProduct(self.weight, self.weight_scale)

            def by_channel(x: torch.Tensor) -> torch.Tensor:
                quantized, token_scale = quantize_rows(x)
                return exact(quantized) * token_scale

            return by_channel

        def by_group(x: torch.Tensor) -> torch.Tensor:
            quantized, scales = quantize_groups(x, self.group)
            return grouped_product(quantized, scales, self.values(), self.weight_scale.float())

        return by_group


class QuantizedEmbedding(QuantizedWeight):
    """An embedding of integer rows.

    Args:
        weight: see `QuantizedWeight`; N is V, M is D.
        weight_scale: `[V, G]`.
        column_scale: `[D]` scale of each column, or None; of an embedding that shares its weights with a smoothed head.
        dtype: of the outputs.
    """

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, column_scale: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(weight, weight_scale, dtype)
        self.column_scale: torch.Tensor | None
        self.register_buffer("column_scale", column_scale)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[...]` int64 -> `[..., D]` in `dtype`."""
        return self.numbers(token_ids.flatten()).to(self.dtype).view(*token_ids.shape, -1)

    def numbers(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """As of any layer, times what columns have."""
        found = super().numbers(rows)
        return found if self.column_scale is None else found * self.column_scale
