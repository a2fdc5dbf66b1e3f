"""Linear layers and embeddings whose weights are int8, with int8 activations made on the fly.

Weights are symmetric per output channel, activations symmetric per token: y = s_token * s_channel * (x_q @ w_q).
The products are exact integers, so oneDNN and the integer reference agree to the bit at every number of rows;
oneDNN's inner operators are wrapped here, checked once against the reference, and left alone where they differ.
"""

# T tokens  N outputs  M inputs

from __future__ import annotations

import functools
import logging

import torch
from torch import nn

log = logging.getLogger(__name__)
LIMIT = 127  # symmetric: -128 is never used
TINY = torch.finfo(torch.float32).tiny  # below it a scale has no inverse


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of `[T, M]` to int8 by its largest magnitude.

    Returns:
        `[T, M]` int8 in -127..127 and `[T, 1]` float32 scales, with x ~ q * scale. A row of zeros has scale 0, and so
        has one of magnitudes below 1.5e-36.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / LIMIT
    scale.masked_fill_(scale < TINY, 0.0)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return (wide * inverse).round_().clamp_(-LIMIT, LIMIT).to(torch.int8), scale


def integer_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The reference: int8 `[T, M]` times int8 `[N, M]` transposed, exactly, times the channel scales `[N]`.

    float64 holds every sum of up to 2**38 products exactly. One rounding to float32 before the scale and one
    after, as oneDNN does.
    """
    return (x.double() @ weight.double().T).float() * scale


def _onednn_product(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """`integer_product` by oneDNN: unit activation scale, zero point 128, weights prepacked."""
    shifted = (x.to(torch.int16) + 128).to(torch.uint8)
    result: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's int8 product is here and equals the reference to the bit on random input."""
    generator = torch.Generator().manual_seed(0)
    try:
        for rows, inputs, outputs in ((1, 64, 48), (7, 576, 192), (33, 1536, 64)):
            x = torch.randint(-LIMIT, LIMIT + 1, (rows, inputs), dtype=torch.int8, generator=generator)
            weight = torch.randint(-LIMIT, LIMIT + 1, (outputs, inputs), dtype=torch.int8, generator=generator)
            scale = torch.rand(outputs, generator=generator) + 1e-3
            packed = torch.ops.onednn.qlinear_prepack(weight, None)
            fast = _onednn_product(x, packed, scale, torch.zeros(outputs, dtype=torch.int64))
            if not torch.equal(fast, integer_product(x, weight, scale)):
                log.warning("oneDNN's int8 product differs from the reference here; using the slower reference")
                return False
    except (AttributeError, RuntimeError) as error:
        log.warning("oneDNN's int8 product is not to be had here (%s); using the slower reference", error)
        return False
    return True


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
        self._packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, M]` float -> `[T, N]` in `dtype`."""
        quantized, token_scale = quantize_rows(x)
        if self._packed is None:
            self._packed = self._pack()
        packed, scale, zeros = self._packed
        if onednn_is_exact():
            product = _onednn_product(quantized, packed, scale, zeros)
        else:
            product = integer_product(quantized, packed, scale)
        product *= token_scale
        if self.bias is not None:
            product += self.bias.float()
        return product.to(self.dtype)

    def _pack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = self.weight_scale.float().flatten().contiguous()
        zeros = torch.zeros(self.weight.shape[0], dtype=torch.int64)
        if not onednn_is_exact():
            return self.weight, scale, zeros
        return torch.ops.onednn.qlinear_prepack(self.weight.contiguous(), None), scale, zeros


class Int8Embedding(nn.Module):
    """An embedding whose rows are int8 with a scale each.

    Args:
        weight: `[V, D]` int8.
        weight_scale: `[V, 1]` per-row scale.
        dtype: of the outputs.
    """

    def __init__(self, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.weight_scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.dtype = dtype

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[T]` int64 -> `[T, D]` in `dtype`."""
        return (self.weight[token_ids].float() * self.weight_scale[token_ids].float()).to(self.dtype)
