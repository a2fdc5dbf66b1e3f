"""int8 and int4 products of every native form against the integer reference, to the bit, at every number of rows."""

from __future__ import annotations

import ctypes

import pytest
import torch

from native_forms import native
from steelyard.kernels import memory, reference
from steelyard.kernels.library import Library
from steelyard.kernels.packing import PackedWeight
from steelyard.kernels.steps import (
    BUFFERS,
    GATES,
    TILE_ROWS,
    Epilogue,
    NativeBatch,
    NativeBuffers,
    NativeStep,
    Place,
    Product,
    gate,
)

MOST = 256
__all__ = ["native"]


def run(product: Product, x: torch.Tensor, scales: torch.Tensor, y: torch.Tensor, native: Library) -> None:
    """Y, at its destination and in place, by the native step."""
    rows = len(scales)
    quantized = torch.zeros((rows + TILE_ROWS) * x.shape[1], dtype=torch.int8)
    quantized[: x.numel()] = x.flatten()
    quantized[x.numel() :] = 77  # rows that are read beside the last and must not matter
    buffers = dict.fromkeys(BUFFERS, y) | {"quantized": quantized, "scales": scales}
    buffers["sums"] = x.view(rows, -1, product.weight.form.group).sum(-1, dtype=torch.int32)
    steps = (NativeStep * 1)(product.native())
    places = NativeBuffers(*(buffers[name].data_ptr() for name in BUFFERS))
    batch = NativeBatch(rows, 0, rows, 0, *[None] * 7)
    native.run(ctypes.addressof(steps), 1, ctypes.addressof(places), ctypes.addressof(batch))


def random_product(
    outputs: int, inputs: int, native: Library, *, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, PackedWeight]:
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    scale, added = torch.rand(outputs) + 1e-3, torch.randn(outputs) if bias else None
    return weight, scale, added, PackedWeight.pack(weight, scale, added, native, memory.Arena())


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (50, 48), (96, 576), (33, 1536)])
def test_every_number_of_rows(native: Library, outputs: int, inputs: int) -> None:
    weight, scale, bias, packed = random_product(outputs, inputs, native, bias=outputs == 50)
    product = Product(packed, Place.WIDE, Epilogue.STORE)
    stride = reference.padded(outputs)
    x = torch.randint(-127, 128, (MOST, inputs), dtype=torch.int8)
    x[0], x[1] = 127, -127
    scales = torch.rand(MOST)
    expected = reference.integer_product(x, weight, scale) * scales[:, None]
    if bias is not None:
        expected = expected + bias
    for rows in range(1, MOST + 1):
        y = torch.full((MOST + 1, stride), float("nan"))
        run(product, x[:rows], scales[:rows], y, native)
        assert torch.equal(y[:rows, :outputs], expected[:rows]), rows
        assert y[rows + 1 :].isnan().all(), "a row was written that is not there"


@pytest.mark.parametrize("epilogue", GATES)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 40, 64])
def test_what_becomes_of_a_product(native: Library, rows: int, epilogue: Epilogue) -> None:
    weight, scale, _, packed = random_product(64, 128, native)
    x, scales = torch.randint(-127, 128, (rows, 128), dtype=torch.int8), torch.rand(rows)
    expected = reference.integer_product(x, weight, scale) * scales[:, None]
    before = torch.randn(rows, 64)
    y = before.clone()
    run(Product(packed, Place.RESIDUAL, Epilogue.ADD), x, scales, y, native)
    assert torch.equal(y, before + expected)
    gated = torch.zeros(rows, 32)
    run(Product(packed, Place.GATED, epilogue), x, scales, gated, native)
    assert torch.equal(gated, gate(expected, epilogue))


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
def test_a_vocabulary_head(native: Library, rows: int) -> None:
    weight, scale, _, packed = random_product(49_152, 576, native)
    x, scales = torch.randint(-127, 128, (rows, 576), dtype=torch.int8), torch.rand(rows)
    y = torch.zeros(rows, 49_152)
    run(Product(packed, Place.LOGITS, Epilogue.STORE), x, scales, y, native)
    assert torch.equal(y, reference.integer_product(x, weight, scale) * scales[:, None])


GROUPED = [(8, 64, 96, 32), (8, 50, 576, 64), (8, 33, 576, 96), (4, 64, 96, 32), (4, 50, 48, 48), (4, 33, 1536, 128)]


def grouped_product(
    bits: int, outputs: int, inputs: int, group: int, native: Library
) -> tuple[torch.Tensor, torch.Tensor, PackedWeight]:
    most = 1 << (bits - 1)
    weight = torch.randint(-most, most, (outputs, inputs), dtype=torch.int8)
    scale = (torch.rand(outputs, inputs // group) + 1e-3).bfloat16()
    packed = PackedWeight.pack(weight, scale, torch.randn(outputs), native, memory.Arena(), bits)
    return weight, scale, packed


@pytest.mark.parametrize(("bits", "outputs", "inputs", "group"), GROUPED)
def test_groups_at_every_number_of_rows(native: Library, bits: int, outputs: int, inputs: int, group: int) -> None:
    weight, scale, packed = grouped_product(bits, outputs, inputs, group, native)
    assert packed.bias is not None
    x = torch.randint(-127, 128, (40, inputs), dtype=torch.int8)
    x[0], x[1] = 127, -127
    scales = torch.rand(40, inputs // group)
    expected = reference.grouped_product(x, scales, weight, scale.float()) + packed.bias[:outputs]
    for rows in range(1, 41):
        y = torch.full((41, reference.padded(outputs)), float("nan"))
        run(Product(packed, Place.WIDE, Epilogue.STORE), x[:rows], scales[:rows], y, native)
        assert torch.equal(y[:rows, :outputs], expected[:rows]), rows


@pytest.mark.parametrize(("bits", "outputs", "inputs", "group"), GROUPED)
def test_groups_are_what_they_mean(bits: int, outputs: int, inputs: int, group: int) -> None:
    most = 1 << (bits - 1)
    weight = torch.randint(-most, most, (outputs, inputs), dtype=torch.int8)
    scale, x = torch.rand(outputs, inputs // group) + 0.1, torch.randn(7, inputs)
    quantized, scales = reference.quantize_groups(x, group)
    rows = (quantized.double().view(7, -1, group) * scales[..., None]).flatten(1)
    assert ((rows - x).abs() <= scales.double().repeat_interleave(group, 1) * 0.501).all()
    columns = (weight.double().view(outputs, -1, group) * scale[..., None]).flatten(1)
    torch.testing.assert_close(
        reference.grouped_product(quantized, scales, weight, scale).double(), rows @ columns.T, rtol=1e-4, atol=1e-3
    )
