"""Every storage type against a scalar float64 reference written from the format's description."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from steelyard.checkpoint.gguf_blocks import BLOCK_TYPES, OTHER_TYPES


def half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def scalar(name: str, raw: bytes) -> list[float]:
    """One block, value by value, in Python floats."""
    if name == "F32":
        return [struct.unpack("<f", raw)[0]]
    if name == "F16":
        return [half(raw)]
    if name == "BF16":
        return [struct.unpack("<f", b"\0\0" + raw)[0]]
    if name == "Q8_0":
        return [half(raw[:2]) * code for code in struct.unpack("<32b", raw[2:])]
    start = 4 if name == "Q4_1" else 2
    codes = [raw[start + i] % 16 for i in range(16)] + [raw[start + i] // 16 for i in range(16)]
    if name == "Q4_1":
        return [half(raw[:2]) * code + half(raw[2:4]) for code in codes]
    assert name == "Q4_0"
    return [half(raw[:2]) * (code - 8) for code in codes]


SIZES = {"F32": 4, "F16": 2, "BF16": 2, "Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def test_no_type_is_untested() -> None:
    assert {block.name for block in BLOCK_TYPES.values()} == SIZES.keys()
    assert not BLOCK_TYPES.keys() & OTHER_TYPES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_decode_equals_the_scalar_reference(name: str) -> None:
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    assert block.layout.itemsize == SIZES[name]
    random = np.random.default_rng(7)
    raw = bytearray(random.integers(0, 256, 200 * SIZES[name], dtype=np.uint8).tobytes())
    for start in range(0, len(raw), SIZES[name]):
        # Finite scales of a usual magnitude; all 256 values of every other byte stay possible.
        if name in ("Q4_0", "Q4_1", "Q8_0"):
            raw[start : start + 2] = struct.pack("<e", random.normal() / 8)
        if name == "Q4_1":
            raw[start + 2 : start + 4] = struct.pack("<e", random.normal())
    decoded = block.decode(np.frombuffer(bytes(raw), block.layout)).reshape(200, -1)
    assert decoded.dtype == np.float32
    assert decoded.shape[1] == block.values
    expected = [scalar(name, bytes(raw[start : start + SIZES[name]])) for start in range(0, len(raw), SIZES[name])]
    np.testing.assert_allclose(decoded, np.array(expected), rtol=1e-6, atol=1e-7)


def test_decode_equals_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(3)
    for number, block in BLOCK_TYPES.items():
        raw = random.integers(0, 60, 64 * block.layout.itemsize, dtype=np.uint8)
        kind = gguf.GGMLQuantizationType(number)
        if block.values == 1:
            continue
        expected = gguf.quants.dequantize(raw.reshape(64, -1), kind).reshape(-1)
        np.testing.assert_array_equal(block.decode(raw.view(block.layout)).reshape(-1), expected)
