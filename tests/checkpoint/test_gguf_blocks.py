"""Every storage type against a scalar float64 reference written from the format's description."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest

from steelyard.checkpoint.gguf_blocks import BLOCK_TYPES, OTHER_TYPES


def half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def k_parts(name: str, raw: bytes) -> Iterator[float]:
    """Eight parts of 32, as ggml's `get_scale_min_k4` and loops have them."""
    packed, rest = raw[4:16], raw[16:]
    high, low = (bytes(32), rest) if name == "Q4_K" else (rest[:32], rest[32:])
    for part in range(8):
        if part < 4:
            scale, least = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = (packed[part + 4] & 15) | ((packed[part - 4] >> 6) << 4)
            least = (packed[part + 4] >> 4) | ((packed[part] >> 6) << 4)
        for i in range(32):
            code = (low[part // 2 * 32 + i] >> (4 * (part % 2))) & 15
            code += 16 * (high[i] >> part & 1)
            yield half(raw[:2]) * scale * code - half(raw[2:4]) * least


def six_bits(raw: bytes) -> Iterator[float]:
    """Two halves of 128 values, each of four parts of 32 with two scales."""
    scales = struct.unpack("<16b", raw[192:208])
    for i in range(256):
        side, part, place = i // 128, i % 128 // 32, i % 32
        low = raw[64 * side + 32 * (part % 2) + place] >> (4 * (part // 2)) & 15
        high = raw[128 + 32 * side + place] >> (2 * part) & 3
        yield half(raw[208:]) * scales[i // 16] * (low + 16 * high - 32)


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
    if name in ("Q5_0", "Q5_1"):
        start = 4 if name == "Q5_1" else 2
        high = int.from_bytes(raw[start : start + 4], "little")
        low = raw[start + 4 :]
        codes = [(low[i % 16] >> (0 if i < 16 else 4)) % 16 + 16 * (high >> i & 1) for i in range(32)]
        least = half(raw[2:4]) if name == "Q5_1" else -16 * half(raw[:2])
        return [half(raw[:2]) * code + least for code in codes]
    if name in ("Q4_K", "Q5_K"):
        return list(k_parts(name, raw))
    if name == "Q6_K":
        return list(six_bits(raw))
    start = 4 if name == "Q4_1" else 2
    codes = [raw[start + i] % 16 for i in range(16)] + [raw[start + i] // 16 for i in range(16)]
    if name == "Q4_1":
        return [half(raw[:2]) * code + half(raw[2:4]) for code in codes]
    assert name == "Q4_0"
    return [half(raw[:2]) * (code - 8) for code in codes]


SIZES = {"F32": 4, "F16": 2, "BF16": 2, "Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
SIZES |= {"Q5_0": 22, "Q5_1": 24, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q5_0": (0,), "Q5_1": (0, 2), "Q6_K": (208,)}
SCALES |= {"Q4_K": (0, 2), "Q5_K": (0, 2)}
"""Where a block's float16 numbers stand."""


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
        for place in SCALES.get(name, ()):
            raw[start + place : start + place + 2] = struct.pack("<e", random.normal() / 8)
    decoded = block.decode(np.frombuffer(bytes(raw), block.layout)).reshape(200, -1)
    assert decoded.dtype == np.float32
    assert decoded.shape[1] == block.values
    expected = [scalar(name, bytes(raw[start : start + SIZES[name]])) for start in range(0, len(raw), SIZES[name])]
    np.testing.assert_allclose(decoded, np.array(expected), rtol=1e-5, atol=2e-5)


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
