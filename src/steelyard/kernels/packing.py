"""Weights as the products read them: int8 or bfloat16, in panels of 32 outputs; see `native/product.h`.

Knows nothing of steps, nor where weights come from.
"""

# N outputs  M inputs  T tokens

from __future__ import annotations

import torch

from steelyard.kernels import memory, reference
from steelyard.kernels.library import Library
from steelyard.kernels.onednn import ExactProduct
from steelyard.kernels.reference import padded

PANEL = 32
LAYOUT = "panels of 32 outputs by 4 inputs"
"""Of packed weights, the same for every native form; changes when their bytes do."""


class PackedWeight:
    """Weights `[N, M]` as the products read them: int8 with a scale per channel, or bfloat16 (dense).

    Args:
        data: packed: int8 as `[ceil(N / 32), M / 4, 32, 4]` uint8, each weight plus 128; bfloat16 as
            `[ceil(N / 32), M / 2, 32, 2]`; or for the twins `[N, M]`.
        scale: `[N, padded to 32]` float32 per channel; None of bfloat16.
        bias: likewise, or None.
        outputs: N.
        inputs: M, a multiple of 16.
    """

    def __init__(
        self,
        data: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        outputs: int,
        inputs: int,
    ) -> None:
        self.data, self.scale, self.bias, self.outputs, self.inputs = data, scale, bias, outputs, inputs
        if data.dtype == torch.int8 and scale is not None:
            self._exact = ExactProduct(data, scale[:outputs])

    @property
    def dense(self) -> bool:
        """Whether the weights are bfloat16."""
        return self.scale is None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Of the twins: int8 or bfloat16 rows `[T, M]` -> `[T, N]` float32."""
        return reference.dense_product(x, self.data) if self.dense else self._exact(x)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the twins: rows of the weight as float32."""
        found = self.data[ids].float()
        return found if self.scale is None else found * self.scale[ids, None]

    @staticmethod
    def shape(outputs: int, inputs: int, dense: bool) -> tuple[int, ...]:
        """Of the packed data."""
        group = 2 if dense else 4
        return padded(outputs, PANEL) // PANEL, padded(inputs) // group, PANEL, group

    @classmethod
    def pack(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        library: Library | None,
        arena: memory.Arena,
    ) -> PackedWeight:
        """Pack a weight.

        Args:
            weight: `[N, M]` int8, or bfloat16 with M a multiple of 32; M is padded to a multiple of 16.
            scale: `[N]` per-channel scale of int8, any float dtype.
            bias: `[N]` or None.
            library: None keeps the plain form for the twins.
            arena: where the packed form will lie.
        """
        outputs, inputs = weight.shape
        width, rows = padded(inputs), padded(outputs, PANEL)
        if width != inputs:
            weight = torch.nn.functional.pad(weight, (0, width - inputs))
        if scale is None:
            weight = reference.storable(weight.float()).bfloat16()
        vectors: list[torch.Tensor | None] = []
        for vector in (scale, bias):
            wide = None if vector is None else torch.zeros(rows)
            if wide is not None and vector is not None:
                wide[:outputs] = vector.float().flatten()
            vectors.append(wide)
        data = weight.contiguous()
        if library is not None:
            data = arena.take(
                *cls.shape(outputs, inputs, scale is None), dtype=weight.dtype if scale is None else torch.uint8
            )
            if scale is None:
                whole = torch.nn.functional.pad(weight, (0, 0, 0, rows - outputs))
                data.copy_(whole.view(rows // PANEL, PANEL, width // 2, 2).transpose(1, 2))
            else:
                library.pack(weight.contiguous(), data)
        return cls(data, vectors[0], vectors[1], outputs, width)


def in_turns(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Rows of two matrices (or vectors) in turns of sixteen: 16 gates, then the 16 values that they open."""
    rows = padded(len(gate))
    both = torch.zeros(rows // 16, 2, 16, *gate.shape[1:], dtype=gate.dtype)
    for place, part in enumerate((gate, value)):
        whole = torch.zeros(rows, *gate.shape[1:], dtype=gate.dtype)
        whole[: len(part)] = part
        both[:, place] = whole.view(rows // 16, 16, *gate.shape[1:])
    return both.flatten(0, 2)
