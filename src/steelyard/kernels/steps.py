"""What a plan is made of: the fused steps, each as the native code reads it and as its twin in PyTorch.

A step reads and writes the plan's buffers; it knows its weights and sizes and nothing of what comes before or after.
"""

# T tokens  N rows that draw  W width, padded to a multiple of 16

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import torch

from steelyard.kernels import memory, reference
from steelyard.kernels.library import Library
from steelyard.kernels.onednn import ExactProduct

PANEL = 32
MOST_HEAD_WIDTH = 1024  # MOST_WIDTH in attention.h
MOST_INPUTS = 1 << 16  # more products of bytes could exceed an int32
MOST_ADAPTERS = 64
"""How many adapters a plan can wear at once."""

Pair = tuple[torch.Tensor, torch.Tensor, float]
"""An adapter's share of a layer: A `[R, W]`, B transposed `[R, N]`, both bfloat16 and padded, and alpha / R."""


def padded(size: int, to: int = reference.LANES) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


class Place(IntEnum):
    """The buffers that steps hand float32 rows on in."""

    WIDE = 0
    RESIDUAL = 1
    GATED = 2
    LOGITS = 3
    NORMED = 4
    MIXED = 5
    DRAWN = 6


class Kind(IntEnum):
    """As `Kind` in plan.cpp."""

    EMBED = 0
    NORM = 1
    PRODUCT = 2
    LOW_RANK = 3
    GATE_ROWS = 4
    ROTATE = 5
    ATTEND = 6
    QUANTIZE = 7
    GATHER = 8


class Epilogue(IntEnum):
    """What becomes of a product."""

    STORE = 0
    ADD = 1
    GATE = 2


class NativeStep(ctypes.Structure):
    """As `Step` in plan.cpp."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("size", ctypes.c_int32 * 7),
        ("value", ctypes.c_float * 2),
        ("pointer", ctypes.c_void_p * 8),
    ]


class NativeLowRank(ctypes.Structure):
    """As `LowRank` in lora.h."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


@dataclass(slots=True)
class Buffers:
    """What a plan works on."""

    places: dict[Place, torch.Tensor]
    """float32 rows by place."""
    queries: torch.Tensor
    """`[T, H, E]` float32, E padded."""
    quantized: torch.Tensor
    """`[T * widest input]` int8; a step sees it as `[T, its input]`."""
    scales: torch.Tensor
    """`[T]` float32."""
    sums: torch.Tensor
    """`[T]` int32."""


@dataclass(slots=True)
class Batch:
    """A step's tokens."""

    token_ids: torch.Tensor
    """`[T]` int32."""
    positions: torch.Tensor
    """`[T]` int32."""
    slots: torch.Tensor
    """`[T]` int32: the cache block of each token."""
    spans: torch.Tensor
    """`[S, 4]` int32: first token of the pack, tokens cached before, new ones, first entry in `tables`."""
    tables: torch.Tensor
    """int32: block tables, one after the other."""
    draws: torch.Tensor
    """`[N]` int32: places in the pack whose successor is drawn."""
    adapters: torch.Tensor | None = None
    """`[T]` int32: each token's adapter, -1 for none; None if no token wears one."""


class Step(Protocol):
    """One step."""

    def native(self) -> NativeStep:
        """As the native code reads it."""
        ...

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """The twin."""
        ...


def _step(
    kind: Kind, size: Sequence[int], tensors: Sequence[torch.Tensor | None] = (), value: float = 0.0
) -> NativeStep:
    step = NativeStep(kind=kind)
    step.size[: len(size)] = list(size)
    step.value[0] = value
    for place, tensor in enumerate(tensors):
        step.pointer[place] = None if tensor is None else tensor.data_ptr()
    return step


class PackedWeight:
    """int8 weights `[N, M]` as the products read them.

    Args:
        weight: `[N, M]` int8; M is padded to a multiple of 16.
        scale: `[N]` per-channel scale, any float dtype.
        bias: `[N]` or None.
        library: packs; None keeps the plain form for the twins.
    """

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, library: Library | None
    ) -> None:
        self.outputs, inputs = weight.shape
        self.inputs = padded(inputs)
        if self.inputs != inputs:
            weight = torch.nn.functional.pad(weight, (0, self.inputs - inputs))
        rows = padded(self.outputs, PANEL)
        self.scale = torch.zeros(rows)
        self.scale[: self.outputs] = scale.float().flatten()
        self.bias: torch.Tensor | None = None
        if bias is not None:
            self.bias = torch.zeros(rows)
            self.bias[: self.outputs] = bias.float()
        if library is None:
            self.data = weight.contiguous()
            self.product = ExactProduct(self.data, self.scale[: self.outputs])
        else:
            self.data = memory.zeros(rows // PANEL, self.inputs // 4, PANEL, 4, dtype=torch.uint8)
            library.pack(weight.contiguous(), self.data)


def in_turns(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Rows of two matrices (or vectors) in turns of sixteen: 16 gates, then the 16 values that they open."""
    rows = padded(len(gate))
    both = torch.zeros(rows // 16, 2, 16, *gate.shape[1:], dtype=gate.dtype)
    for place, part in enumerate((gate, value)):
        whole = torch.zeros(rows, *gate.shape[1:], dtype=gate.dtype)
        whole[: len(part)] = part
        both[:, place] = whole.view(rows // 16, 16, *gate.shape[1:])
    return both.flatten(0, 2)


@dataclass(slots=True)
class Embed:
    """Token ids -> residual rows."""

    table: PackedWeight

    def native(self) -> NativeStep:
        """See `Step`."""
        return _step(Kind.EMBED, [self.table.inputs], [self.table.data, self.table.scale])

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        ids = batch.token_ids.long()
        rows = self.table.data[ids].float() * self.table.scale[ids, None]
        buffers.places[Place.RESIDUAL][: len(ids)] = rows


@dataclass(slots=True)
class Norm:
    """Residual rows (or those that draw) -> normalised rows, and the same in int8."""

    weight: torch.Tensor
    """`[W]` float32."""
    size: int
    """Of the width, what is no padding."""
    epsilon: float
    drawn: bool = False

    def native(self) -> NativeStep:
        """See `Step`."""
        return _step(Kind.NORM, [len(self.weight), self.size, int(self.drawn)], [self.weight], self.epsilon)

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        count = len(batch.draws if self.drawn else batch.token_ids)
        x = buffers.places[Place.DRAWN if self.drawn else Place.RESIDUAL][:count]
        normed = reference.normalize(x, self.weight, self.size, self.epsilon)
        buffers.places[Place.NORMED][:count] = normed
        _quantize(buffers, normed)


@dataclass(slots=True)
class Quantize:
    """Rows -> int8."""

    width: int
    source: Place

    def native(self) -> NativeStep:
        """See `Step`."""
        return _step(Kind.QUANTIZE, [self.width, self.source])

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        _quantize(buffers, buffers.places[self.source][: len(batch.token_ids)])


def _quantize(buffers: Buffers, x: torch.Tensor) -> None:
    quantized, scale = reference.quantize_rows(x)
    buffers.quantized[: x.numel()] = quantized.flatten()
    buffers.scales[: len(x)] = scale.flatten()


@dataclass(slots=True)
class Product:
    """int8 rows times int8 weights -> rows: stored, added, or gate times value at once."""

    weight: PackedWeight
    destination: Place
    epilogue: Epilogue

    def native(self) -> NativeStep:
        """See `Step`."""
        sizes = [
            self.weight.inputs,
            self.weight.outputs,
            self._stride,
            self.epilogue,
            self.destination,
            int(self._drawn),
        ]
        return _step(Kind.PRODUCT, sizes, [self.weight.data, self.weight.scale, self.weight.bias])

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        count, outputs = len(batch.draws if self._drawn else batch.token_ids), self.weight.outputs
        x = buffers.quantized[: count * self.weight.inputs].view(count, -1)
        y = self.weight.product(x) * buffers.scales[:count, None]
        if self.weight.bias is not None:
            y = y + self.weight.bias[:outputs]
        rows = buffers.places[self.destination][:count, :outputs]
        if self.epilogue == Epilogue.ADD:
            rows += y
        elif self.epilogue == Epilogue.STORE:
            rows[:] = y
        elif batch.adapters is not None:
            buffers.places[Place.WIDE][:count, :outputs] = y
        else:
            buffers.places[Place.GATED][:count] = gate(y)

    @property
    def _drawn(self) -> bool:
        return self.destination == Place.LOGITS

    @property
    def _stride(self) -> int:
        if self.epilogue == Epilogue.GATE:
            return self.weight.outputs // 2
        return self.weight.outputs if self._drawn else padded(self.weight.outputs)


def gate(both: torch.Tensor) -> torch.Tensor:
    """`[T, 2 W]`, gates and values in turns of sixteen -> `[T, W]`: silu(gate) * value."""
    parts = both.view(len(both), -1, 2, 16)
    return (parts[:, :, 1] * reference.silu(parts[:, :, 0])).flatten(1)


@dataclass(slots=True)
class LowRank:
    """The adapters' share of one layer; does nothing in a batch without adapters."""

    inputs: int
    outputs: int
    stride: int
    source: Place
    destination: Place
    column: int = 0
    turns: bool = False
    """The outputs stand in turns of sixteen with another layer's."""
    pairs: dict[int, Pair] = field(default_factory=dict)
    """By adapter."""
    _table: ctypes.Array[NativeLowRank] = field(default_factory=lambda: (NativeLowRank * MOST_ADAPTERS)(), repr=False)

    def wear(self, adapter: int, pair: Pair) -> None:
        """Take an adapter's share in; the native step sees it at once."""
        a, b, scale = self.pairs[adapter] = pair
        self._table[adapter] = NativeLowRank(a.data_ptr(), b.data_ptr(), len(a), scale)

    def take_off(self, adapter: int) -> None:
        """Forget an adapter's share, if it has one here."""
        if self.pairs.pop(adapter, None) is not None:
            self._table[adapter] = NativeLowRank()

    def native(self) -> NativeStep:
        """See `Step`."""
        sizes = [self.inputs, self.outputs, self.stride, self.source, self.destination, self.column, int(self.turns)]
        step = _step(Kind.LOW_RANK, sizes)
        step.pointer[0] = ctypes.addressof(self._table)
        return step

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        if batch.adapters is None:
            return
        for adapter, pair in self.pairs.items():
            places = (batch.adapters == adapter).nonzero().flatten()
            if not len(places):
                continue
            x = buffers.places[self.source][places]
            rows = buffers.places[self.destination]
            columns = torch.arange(self.outputs)
            if self.turns:
                columns = columns // 16 * 32 + columns % 16
            columns += self.column
            y = reference.low_rank(x, rows[places][:, columns], *pair)
            rows[places[:, None], columns] = y


@dataclass(slots=True)
class GateRows:
    """Gate times value for a batch with adapters, whose share had to come first."""

    width: int

    def native(self) -> NativeStep:
        """See `Step`."""
        return _step(Kind.GATE_ROWS, [self.width])

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        if batch.adapters is not None:
            count = len(batch.token_ids)
            buffers.places[Place.GATED][:count] = gate(buffers.places[Place.WIDE][:count, : 2 * self.width])


@dataclass(slots=True)
class HeadSizes:
    """Of one layer's attention."""

    heads: int
    kv_heads: int
    size: int
    window: int
    """0: no window."""
    keys: torch.Tensor
    """`[blocks, K, E, 32]` bfloat16, this layer's."""
    values: torch.Tensor
    """`[blocks, K, 32, E]` bfloat16."""


@dataclass(slots=True)
class Rotate:
    """Queries, keys and values -> turned queries, and keys and values in the cache."""

    heads: HeadSizes
    cos: torch.Tensor
    """`[context, E / 2]` float32."""
    sin: torch.Tensor
    query_norm: torch.Tensor | None = None
    """`[E]` float32, padded."""
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0

    def native(self) -> NativeStep:
        """See `Step`."""
        h = self.heads
        stride = padded((h.heads + 2 * h.kv_heads) * h.size)
        sizes = [h.heads, h.kv_heads, h.size, padded(h.size), h.window, stride]
        tensors = [h.keys, h.values, self.cos, self.sin, self.query_norm, self.key_norm]
        return _step(Kind.ROTATE, sizes, tensors, self.epsilon)

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        h, count = self.heads, len(batch.token_ids)
        joint = buffers.places[Place.WIDE][:count, : (h.heads + 2 * h.kv_heads) * h.size].view(count, -1, h.size)
        queries, keys, values = joint.split([h.heads, h.kv_heads, h.kv_heads], dim=1)  # type: ignore[no-untyped-call]
        if self.query_norm is not None and self.key_norm is not None:
            queries = self._normed(queries, self.query_norm)
            keys = self._normed(keys, self.key_norm)
        positions = batch.positions.long()
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        factor = float(1.0 / torch.tensor(float(h.size)).sqrt())
        buffers.queries[:count] = 0
        buffers.queries[:count, :, : h.size] = reference.rotate(queries, cos, sin, factor)
        blocks, offsets = batch.slots.long(), positions % reference.BLOCK
        h.keys[blocks, :, : h.size, offsets] = reference.rotate(keys, cos, sin, 1.0).to(h.keys.dtype)
        h.values[blocks, :, offsets, : h.size] = values.to(h.values.dtype)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.pad(x, (0, len(weight) - x.shape[-1]))
        return reference.normalize(whole, weight, x.shape[-1], self.epsilon)[..., : x.shape[-1]]


@dataclass(slots=True)
class Attend:
    """Turned queries -> mixed values."""

    heads: HeadSizes

    def native(self) -> NativeStep:
        """See `Step`."""
        h = self.heads
        sizes = [h.heads, h.kv_heads, h.size, padded(h.size), h.window, padded(h.heads * h.size)]
        return _step(Kind.ATTEND, sizes, [h.keys, h.values])

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        h = self.heads
        share, width = h.heads // h.kv_heads, h.heads * h.size
        out = buffers.places[Place.MIXED]
        for start, computed, count, first in batch.spans.tolist():
            table = batch.tables[first : first + -(-(computed + count) // reference.BLOCK)].long()
            queries = buffers.queries[start : start + count].view(count, h.kv_heads, share, -1)
            positions = torch.arange(computed, computed + count)
            mixed = [
                reference.attend(queries[:, head], positions, h.keys[table, head], h.values[table, head], h.window)
                for head in range(h.kv_heads)
            ]
            joint = torch.stack(mixed, dim=1)[..., : h.size]
            out[start : start + count, :width] = joint.reshape(count, width)


@dataclass(slots=True)
class Gather:
    """The residual rows that draw, side by side."""

    width: int

    def native(self) -> NativeStep:
        """See `Step`."""
        return _step(Kind.GATHER, [self.width])

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        buffers.places[Place.DRAWN][: len(batch.draws)] = buffers.places[Place.RESIDUAL][batch.draws.long()]
