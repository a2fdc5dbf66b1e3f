"""Weights as the products read them: int8, int4 or bfloat16, in panels of 32 outputs; see `native/product.h`.

Knows nothing of steps, nor where weights come from.
"""

# N outputs  M inputs  G groups of inputs  T tokens

from __future__ import annotations

from dataclasses import dataclass

import torch

from steelyard.kernels import memory, reference
from steelyard.kernels.library import Library
from steelyard.kernels.onednn import ExactProduct
from steelyard.kernels.reference import padded

PANEL = 32
LAYOUT = "panels of 32 outputs by 4 inputs, int4 by 8"
"""Of packed weights, the same for every native form; changes when their bytes do."""


@dataclass(frozen=True, slots=True)
class Form:
    """The sizes of a packed weight."""

    outputs: int
    inputs: int
    """A multiple of 16."""
    bits: int
    """16: bfloat16; 8 or 4: integers with scales."""
    group: int
    """Inputs that share a scale, of the weights and of what they read: all, or a multiple of 16. Of bfloat16 0."""

    @property
    def dense(self) -> bool:
        """Whether the weights are bfloat16."""
        return self.bits == 16

    @property
    def grouped(self) -> bool:
        """Whether the products are summed group by group."""
        return not self.dense and (self.bits == 4 or self.group != self.inputs)

    @property
    def groups(self) -> int:
        """G."""
        return self.inputs // self.group

    @property
    def data(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the packed weights."""
        together = 32 // self.bits  # to four bytes
        shape = padded(self.outputs, PANEL) // PANEL, self.inputs // together, PANEL
        return ((*shape, 2), torch.bfloat16) if self.dense else ((*shape, 4), torch.uint8)

    @property
    def scale(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of the packed scales."""
        if self.dense:
            return None
        panels = padded(self.outputs, PANEL) // PANEL
        return ((panels, self.groups, PANEL), torch.bfloat16) if self.grouped else ((panels * PANEL,), torch.float32)


class PackedWeight:
    """Weights `[N, M]` as the products read them.

    Args:
        data: packed: int8 as `[ceil(N / 32), M / 4, 32, 4]` uint8, each weight plus 128; int4 as `[.., M / 8, 32, 4]`
            uint8, two of them plus 8 a byte; bfloat16 as `[.., M / 2, 32, 2]`; or for the twins `[N, M]`.
        scale: `[N, padded to 32]` float32 per channel; of groups `[ceil(N / 32), G, 32]` bfloat16; None of bfloat16.
        bias: `[N, padded to 32]` float32, or None.
        form: its sizes.
    """

    def __init__(self, data: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, form: Form) -> None:
        self.data, self.scale, self.bias, self.form = data, scale, bias, form
        if data.dtype == torch.int8 and scale is not None and not form.grouped:
            self._exact = ExactProduct(data, scale[: form.outputs])

    def product(self, x: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
        """Of the twins: int8 rows `[T, M]` with scales `[T, G]`, or bfloat16 rows -> `[T, N]` float32."""
        if self.form.dense:
            return reference.dense_product(x, self.data)
        if not self.form.grouped:
            return self._exact(x) * x_scale
        return reference.grouped_product(x, x_scale, self.data, self._plain_scale())

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the twins: rows of the weight as float32."""
        found = self.data[ids].float()
        if self.scale is None:
            return found
        if not self.form.grouped:
            return found * self.scale[ids, None]
        scale = self._plain_scale()[ids]
        return (found.view(*scale.shape, -1) * scale[..., None]).flatten(1)

    def _plain_scale(self) -> torch.Tensor:
        """Of groups: `[N, G]` float32."""
        assert self.scale is not None
        return self.scale.float().transpose(1, 2).flatten(0, 1)[: self.form.outputs]

    @classmethod
    def pack(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        library: Library | None,
        arena: memory.Arena,
        bits: int | None = None,
    ) -> PackedWeight:
        """Pack a weight.

        Args:
            weight: `[N, M]` int8 (of int4 in -8..7), or bfloat16 with M a multiple of 32; M is padded to a multiple of
                16, where inputs have one scale.
            scale: of int8 and int4 `[N, G]`, any float dtype; of groups it has to be a bfloat16's value.
            bias: `[N]` or None.
            library: None keeps the plain form for the twins.
            arena: where the packed form will lie.
            bits: 8 unless said, 16 without scales.
        """
        outputs, inputs = weight.shape
        width, rows = padded(inputs), padded(outputs, PANEL)
        if width != inputs:
            weight = torch.nn.functional.pad(weight, (0, width - inputs))
        wide = None if scale is None else torch.zeros(rows, scale.flatten(1).shape[1] if scale.dim() > 1 else 1)
        if wide is not None and scale is not None:
            wide[:outputs] = scale.float().view(outputs, -1)
        group = 0 if wide is None else width // wide.shape[1]
        form = Form(outputs, width, bits or (16 if scale is None else 8), group)
        if scale is None:
            weight = reference.storable(weight.float()).bfloat16()
        elif wide is not None:
            panels = wide.view(rows // PANEL, PANEL, -1).transpose(1, 2).bfloat16().contiguous()
            scale = panels if form.grouped else wide.flatten()
        if bias is not None:
            bias = torch.nn.functional.pad(bias.float().flatten(), (0, rows - outputs))
        data = weight.contiguous()
        if library is not None:
            shape, dtype = form.data
            data = arena.take(*shape, dtype=dtype)
            if form.dense:
                whole = torch.nn.functional.pad(weight, (0, 0, 0, rows - outputs))
                data.copy_(whole.view(rows // PANEL, PANEL, width // 2, 2).transpose(1, 2))
            else:
                library.pack(weight.contiguous(), data, form.bits)
        return cls(data, scale, bias, form)


def in_turns(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Rows of two matrices (or vectors) in turns of sixteen: 16 gates, then the 16 values that they open."""
    rows = padded(len(gate))
    both = torch.zeros(rows // 16, 2, 16, *gate.shape[1:], dtype=gate.dtype)
    for place, part in enumerate((gate, value)):
        whole = torch.zeros(rows, *gate.shape[1:], dtype=gate.dtype)
        whole[: len(part)] = part
        both[:, place] = whole.view(rows // 16, 16, *gate.shape[1:])
    return both.flatten(0, 2)
