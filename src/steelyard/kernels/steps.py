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

from steelyard.kernels import reference
from steelyard.kernels.packing import PackedWeight
from steelyard.kernels.reference import padded

TILE_ROWS = 16  # of quantised rows, so many more than a batch has may be read
MOST_HEAD_WIDTH = 1024  # MOST_WIDTH in attention.h
MOST_INPUTS = 1 << 16  # more products of bytes could exceed an int32
MOST_ADAPTERS = 64
"""How many adapters a plan can wear at once."""

Pair = tuple[torch.Tensor, torch.Tensor, float]
"""An adapter's share of a layer: A `[R, W]`, B transposed `[R, N]`, both bfloat16 and padded, and alpha / R."""


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
    ADD_NORM = 9


class Epilogue(IntEnum):
    """What becomes of a product."""

    STORE = 0
    ADD = 1
    SILU_GATE = 2
    GELU_GATE = 3


GATES = {Epilogue.SILU_GATE: reference.silu, Epilogue.GELU_GATE: reference.gelu}
"""What opens the gates."""


class NativeStep(ctypes.Structure):
    """As `Step` in plan.cpp."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("size", ctypes.c_int32 * 8),
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


BUFFERS = ("residual", "wide", "normed", "queries", "mixed", "gated", "drawn", "logits", "quantized", "scales", "sums")
BATCH = ("token_ids", "positions", "slots", "spans", "tables", "draws", "adapters")
"""Their fields that are addresses, in order."""


class NativeBuffers(ctypes.Structure):
    """As `Buffers` in plan.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in BUFFERS]


class NativeBatch(ctypes.Structure):
    """As `Batch` in plan.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("tokens", "span_count", "draw_count", "unused")),
        *((name, ctypes.c_void_p) for name in BATCH),
    ]


@dataclass(slots=True)
class Buffers:
    """What a plan works on."""

    places: dict[Place, torch.Tensor]
    """float32 rows by place."""
    queries: torch.Tensor
    """`[T, H, E]` bfloat16, E padded."""
    quantized: torch.Tensor
    """`[(T + 16) * widest input]` bytes; a step sees them as `[T, its input]` int8 or bfloat16."""
    scales: torch.Tensor
    """`[T * most groups]` float32; a step sees them as `[T, its groups]`."""
    sums: torch.Tensor
    """`[T * most groups]` int32, likewise."""

    def rounded(self, count: int, width: int, dense: bool) -> torch.Tensor:
        """The rows that a product reads: `[count, width]` int8, or bfloat16 for a dense one."""
        dtype = torch.bfloat16 if dense else torch.int8
        return self.quantized[: count * width * dtype.itemsize].view(dtype).view(count, width)


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


@dataclass(slots=True)
class Embed:
    """Token ids -> residual rows."""

    table: PackedWeight
    columns: torch.Tensor | None = None
    """`[W]` float32: a scale of each column."""

    def native(self) -> NativeStep:
        """See `Step`."""
        form = self.table.form
        return _step(
            Kind.EMBED, [form.inputs, form.bits, form.group], [self.table.data, self.table.scale, self.columns]
        )

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        ids = batch.token_ids.long()
        rows = self.table.rows(ids)
        buffers.places[Place.RESIDUAL][: len(ids)] = rows if self.columns is None else rows * self.columns


@dataclass(slots=True)
class Norm:
    """Residual rows (or those that draw) -> normalised rows, and the same rounded."""

    weight: torch.Tensor
    """`[W]` float32."""
    size: int
    """Of the width, what is no padding."""
    epsilon: float
    group: int
    """How many values are rounded to int8 by one scale; 0: they are rounded to bfloat16."""
    drawn: bool = False

    def native(self) -> NativeStep:
        """See `Step`."""
        return _step(Kind.NORM, [len(self.weight), self.size, int(self.drawn), self.group], [self.weight], self.epsilon)

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        count = len(batch.draws if self.drawn else batch.token_ids)
        x = buffers.places[Place.DRAWN if self.drawn else Place.RESIDUAL][:count]
        normed = reference.normalize(x, self.weight, self.size, self.epsilon)
        buffers.places[Place.NORMED][:count] = normed
        _round(buffers, normed, self.group)


@dataclass(slots=True)
class AddNorm:
    """Normalised wide rows -> added to the residual ones."""

    weight: torch.Tensor
    """`[W]` float32, W without padding."""
    epsilon: float

    def native(self) -> NativeStep:
        """See `Step`."""
        return _step(Kind.ADD_NORM, [len(self.weight)], [self.weight], self.epsilon)

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        count, size = len(batch.token_ids), len(self.weight)
        x = buffers.places[Place.WIDE][:count, :size]
        buffers.places[Place.RESIDUAL][:count] += reference.normalize(x, self.weight, size, self.epsilon)


@dataclass(slots=True)
class Quantize:
    """Rows -> int8 or bfloat16."""

    width: int
    source: Place
    group: int
    """As of `Norm`."""

    def native(self) -> NativeStep:
        """See `Step`."""
        return _step(Kind.QUANTIZE, [self.width, self.source, self.group])

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        _round(buffers, buffers.places[self.source][: len(batch.token_ids)], self.group)


def _round(buffers: Buffers, x: torch.Tensor, group: int) -> None:
    rows = buffers.rounded(len(x), x.shape[1], not group)
    if not group:
        rows[:] = reference.storable(x).bfloat16()
        return
    quantized, scale = reference.quantize_groups(x, group)
    rows[:] = quantized
    buffers.scales[: scale.numel()] = scale.flatten()


@dataclass(slots=True)
class Product:
    """Rounded rows times weights -> rows: stored, added, or gate times value at once."""

    weight: PackedWeight
    destination: Place
    epilogue: Epilogue

    def native(self) -> NativeStep:
        """See `Step`."""
        sizes = [
            self.weight.form.inputs,
            self.weight.form.outputs,
            self._stride,
            self.epilogue,
            self.destination,
            int(self._drawn),
            self.weight.form.bits,
            self.weight.form.group,
        ]
        return _step(Kind.PRODUCT, sizes, [self.weight.data, self.weight.scale, self.weight.bias])

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        count, form = len(batch.draws if self._drawn else batch.token_ids), self.weight.form
        outputs, groups = form.outputs, 0 if form.dense else form.groups
        scales = buffers.scales[: count * groups].view(count, groups)
        y = self.weight.product(buffers.rounded(count, form.inputs, form.dense), scales)
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
            buffers.places[Place.GATED][:count] = gate(y, self.epilogue)

    @property
    def _drawn(self) -> bool:
        return self.destination == Place.LOGITS

    @property
    def _stride(self) -> int:
        if self.epilogue in GATES:
            return self.weight.form.outputs // 2
        return self.weight.form.outputs if self._drawn else padded(self.weight.form.outputs)


def gate(both: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """`[T, 2 W]`, gates and values in turns of sixteen -> `[T, W]`: silu(gate) * value, or gelu(gate) * value."""
    parts = both.view(len(both), -1, 2, 16)
    return (parts[:, :, 1] * GATES[epilogue](parts[:, :, 0])).flatten(1)


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
    epilogue: Epilogue

    def native(self) -> NativeStep:
        """See `Step`."""
        return _step(Kind.GATE_ROWS, [self.width, self.epilogue])

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        if batch.adapters is not None:
            count = len(batch.token_ids)
            buffers.places[Place.GATED][:count] = gate(
                buffers.places[Place.WIDE][:count, : 2 * self.width], self.epilogue
            )


@dataclass(slots=True)
class HeadSizes:
    """Of one layer's attention, and its cache."""

    heads: int
    kv_heads: int
    size: int
    window: int
    """0: no window."""
    keys: torch.Tensor
    """`[blocks, K, E / 2, 32, 2]` bfloat16 or int8, this layer's; E padded to a multiple of 32."""
    values: torch.Tensor
    """`[blocks, K, 16, E, 2]`."""
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of int8 keys and values, each `[blocks, K, 32]` float32."""

    @property
    def padded(self) -> int:
        """E padded."""
        return self.values.shape[-2]

    def native(self, kind: Kind, stride: int, *others: torch.Tensor | None, value: float = 0.0) -> NativeStep:
        """A step over these heads; `others` are its own tensors."""
        sizes = [self.heads, self.kv_heads, self.size, self.padded, self.window, stride, self.keys.itemsize]
        tensors = [self.keys, self.values, *others, *[None] * (4 - len(others)), *(self.scales or ())]
        return _step(kind, sizes, tensors, value)


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
        return h.native(Kind.ROTATE, stride, self.cos, self.sin, self.query_norm, self.key_norm, value=self.epsilon)

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
        buffers.queries[:count] = self._stored(reference.rotate(queries, cos, sin, factor))[0]
        blocks, offsets = batch.slots.long(), positions % reference.BLOCK
        keys, values = reference.rotate(keys, cos, sin, 1.0), values.contiguous()
        for place, (x, cache) in enumerate(((keys, h.keys), (values, h.values))):
            stored, scale = self._stored(x, to_bytes=h.scales is not None)
            if place == 0:
                cache[blocks, :, :, offsets] = stored.view(*stored.shape[:2], -1, 2)
            else:
                cache[blocks, :, offsets // 2, :, offsets % 2] = stored
            if h.scales is not None:
                h.scales[place][blocks, :, offsets] = scale

    def _stored(self, x: torch.Tensor, *, to_bytes: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, heads, size]` -> `[T, heads, E]` bfloat16, or int8 with scales `[T, heads]`."""
        wide = torch.nn.functional.pad(reference.storable(x), (0, self.heads.padded - x.shape[-1]))
        if not to_bytes:
            return wide.bfloat16(), wide[..., 0]
        quantized, scale = reference.quantize_rows(wide.flatten(0, 1))
        return quantized.view(wide.shape), scale.view(wide.shape[:-1])

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.pad(x, (0, len(weight) - x.shape[-1]))
        return reference.normalize(whole, weight, x.shape[-1], self.epsilon)[..., : x.shape[-1]]


@dataclass(slots=True)
class Attend:
    """Turned queries -> mixed values."""

    heads: HeadSizes

    def native(self) -> NativeStep:
        """See `Step`."""
        return self.heads.native(Kind.ATTEND, padded(self.heads.heads * self.heads.size))

    def run(self, buffers: Buffers, batch: Batch) -> None:
        """See `Step`."""
        h = self.heads
        share, width = h.heads // h.kv_heads, h.heads * h.size
        out = buffers.places[Place.MIXED]
        for start, computed, count, first in batch.spans.tolist():
            table = batch.tables[first : first + -(-(computed + count) // reference.BLOCK)].long()
            queries = buffers.queries[start : start + count].view(count, h.kv_heads, share, -1)
            positions = torch.arange(computed, computed + count)
            mixed = []
            for head in range(h.kv_heads):
                scales = None if h.scales is None else (h.scales[0][table, head], h.scales[1][table, head])
                cached = h.keys[table, head], h.values[table, head]
                mixed.append(reference.attend(queries[:, head], positions, *cached, h.window, scales))
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
