"""A product of rows that are rounded on the way, by the native kernels: what two steps of a plan do, without one."""

# T tokens  N outputs  M inputs  G groups of inputs

from __future__ import annotations

import ctypes

import torch

from steelyard.kernels import memory
from steelyard.kernels.library import Library
from steelyard.kernels.packing import PackedWeight
from steelyard.kernels.reference import padded
from steelyard.kernels.steps import (
    BATCH,
    BUFFERS,
    TILE_ROWS,
    Epilogue,
    NativeBatch,
    NativeBuffers,
    NativeStep,
    Place,
    Product,
    Quantize,
)


class RoundedProduct:
    """Rows times a weight of integers, both rounded; the same bits as `models/linear.py` in PyTorch.

    Args:
        weight: `[N, M]` int8.
        scale: `[N, G]`.
        bits: 8 or 4.
        library: the native kernels.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bits: int, library: Library) -> None:
        self.library = library
        self.weight = PackedWeight.pack(weight, scale, None, library, memory.Arena(0), bits)
        form = self.weight.form
        product = Product(self.weight, Place.WIDE, Epilogue.STORE)
        steps = Quantize(form.inputs, Place.NORMED, form.group), product
        self._steps = (NativeStep * 2)(*(step.native() for step in steps))

    def __deepcopy__(self, memo: object) -> RoundedProduct:
        """Itself: nothing of it changes, and addresses cannot be copied."""
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, M]` float -> `[T, N]` float32."""
        form, count = self.weight.form, len(x)
        rows = torch.nn.functional.pad(x.float(), (0, form.inputs - x.shape[1])).contiguous()
        width = padded(form.outputs)
        y = torch.empty((count + 1) * width)
        quantized = torch.empty((count + TILE_ROWS) * form.inputs, dtype=torch.int8)
        scales, sums = torch.empty(count * form.groups), torch.empty(count * form.groups, dtype=torch.int32)
        used = {"normed": rows, "wide": y, "quantized": quantized, "scales": scales, "sums": sums}
        buffers = NativeBuffers(*(used[name].data_ptr() if name in used else None for name in BUFFERS))
        batch = NativeBatch(count, 0, 0, 0, *[None] * len(BATCH))
        self.library.run(ctypes.addressof(self._steps), 2, ctypes.addressof(buffers), ctypes.addressof(batch))
        return y[: count * width].view(count, width)[:, : form.outputs]
