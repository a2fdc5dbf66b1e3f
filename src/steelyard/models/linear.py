"""Linear layers and embeddings whose weights are int8, with int8 activations made on the fly.

Weights are symmetric per output channel, activations symmetric per token: y = s_token * s_channel * (x_q @ w_q).
The products are exact integers, so every way to compute them agrees to the bit at every number of rows.
"""

# T tokens  N outputs  M inputs  V vocabulary  D model width

from __future__ import annotations

import torch
from torch import nn

from steelyard.kernels.onednn import ExactProduct
from steelyard.kernels.reference import quantize_rows


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and activations.

    Args:
        weight: `[N, M]` int8.
        weight_scale: `[N, 1]` per-channel scale, any float dtype.
        bias: `[N]` or None, added in float32.
        dtype: of the outputs.
    """

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.weight_scale: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.dtype = dtype
        self._product: ExactProduct | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, M]` float -> `[T, N]` in `dtype`."""
        quantized, token_scale = quantize_rows(x)
        if self._product is None:
            self._product = ExactProduct(self.weight, self.weight_scale)
        outputs = self._product(quantized) * token_scale
        if self.bias is not None:
            outputs += self.bias.float()
        return outputs.to(self.dtype)


class Int8Embedding(nn.Module):
    """An embedding whose rows are int8 with a scale each.

    Args:
        weight: `[V, D]` int8.
        weight_scale: `[V, 1]` per-row scale.
        column_scale: `[D]` scale of each column, or None; of an embedding that shares its weights with a smoothed head.
        dtype: of the outputs.
    """

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, column_scale: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.weight_scale: torch.Tensor
        self.column_scale: torch.Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("column_scale", column_scale)
        self.dtype = dtype

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[T]` int64 -> `[T, D]` in `dtype`."""
        rows = self.weight[token_ids].float() * self.weight_scale[token_ids].float()
        return (rows if self.column_scale is None else rows * self.column_scale).to(self.dtype)
