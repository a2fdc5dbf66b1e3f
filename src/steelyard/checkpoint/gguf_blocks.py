"""How GGUF stores numbers: for each type its block, and the vectorised step from blocks to float32.

Knows nothing of files or names. A further type is one entry in `BLOCK_TYPES`.

Source: the block layouts in ggml's `ggml-common.h` and `dequantize_row_*` in `ggml-quants.c`.
"""

# N blocks  32 values in a block of the quantised types, 256 in one of the K types, which has parts of 16 or 32

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.checkpoint import bfloat16


@dataclass(frozen=True)
class BlockType:
    """One storage type. `decode` takes `[N]` records of `layout` and gives float32 of N x `values`, in any shape."""

    name: str
    values: int
    layout: np.dtype[Any]
    decode: Callable[[NDArray[Any]], NDArray[np.float32]]


def _float(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return blocks.astype(np.float32)


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[N, 16] bytes -> [N, 32]: first all the low halves, then all the high ones."""
    return np.concatenate((packed & 0x0F, packed >> 4), axis=1).astype(np.float32)


def _q4_0(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return (_nibbles(blocks["quants"]) - np.float32(8)) * _float(blocks["scale"])[:, None]


def _q4_1(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _nibbles(blocks["quants"]) * _float(blocks["scale"])[:, None] + _float(blocks["minimum"])[:, None]


def _q8_0(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _float(blocks["quants"]) * _float(blocks["scale"])[:, None]


def _fifths(high: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[N, 4] bytes of one bit a value -> [N, 32], each 0 or 16."""
    return np.unpackbits(high, axis=1, bitorder="little").astype(np.float32) * np.float32(16)


def _q5_0(blocks: NDArray[Any]) -> NDArray[np.float32]:
    codes = _nibbles(blocks["quants"]) + _fifths(blocks["high"])
    return (codes - np.float32(16)) * _float(blocks["scale"])[:, None]


def _q5_1(blocks: NDArray[Any]) -> NDArray[np.float32]:
    codes = _nibbles(blocks["quants"]) + _fifths(blocks["high"])
    return codes * _float(blocks["scale"])[:, None] + _float(blocks["minimum"])[:, None]


def _parts(blocks: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and minimum `[N, 8, 1]` of each part, six bits each: of the first four in the low bits of bytes 0 to 7; of
    the last four the low halves in bytes 8 to 11, and the rest in the two bits that bytes 0 to 7 have left.
    """
    packed = blocks["parts"]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    wide, least = _float(blocks["scale"])[:, None], _float(blocks["minimum"])[:, None]
    return (wide * _float(scales))[..., None], (least * _float(minima))[..., None]


def _halves(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, 128] bytes -> [N, 8, 32]: of every 32 bytes first the low halves, then the high ones."""
    rows = packed.reshape(len(packed), 4, 32)
    return np.stack((rows & 15, rows >> 4), axis=2).reshape(len(packed), 8, 32)


def _q4_k(blocks: NDArray[Any]) -> NDArray[np.float32]:
    scales, minima = _parts(blocks)
    return _float(_halves(blocks["quants"])) * scales - minima


def _q5_k(blocks: NDArray[Any]) -> NDArray[np.float32]:
    scales, minima = _parts(blocks)
    # Bit p of byte i belongs to value i of part p.
    fifths = blocks["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _float(_halves(blocks["quants"]) | fifths << 4) * scales - minima


def _q6_k(blocks: NDArray[Any]) -> NDArray[np.float32]:
    count = len(blocks)
    rows = blocks["quants"].reshape(count, 2, 64)  # of half the values: low bits of two parts, then of two others
    low = np.stack((rows & 15, rows >> 4), axis=2).reshape(count, 2, 4, 32)
    high = blocks["high"].reshape(count, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & 3
    codes = _float(low | high << 4).reshape(count, 16, 16) - np.float32(32)
    return codes * (_float(blocks["scale"])[:, None] * _float(blocks["parts"]))[..., None]


# ggml's number -> the type.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, np.dtype("<f4"), _float),
    1: BlockType("F16", 1, np.dtype("<f2"), _float),
    2: BlockType("Q4_0", 32, np.dtype([("scale", "<f2"), ("quants", "u1", 16)]), _q4_0),
    3: BlockType("Q4_1", 32, np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("quants", "u1", 16)]), _q4_1),
    6: BlockType("Q5_0", 32, np.dtype([("scale", "<f2"), ("high", "u1", 4), ("quants", "u1", 16)]), _q5_0),
    7: BlockType(
        "Q5_1", 32, np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("high", "u1", 4), ("quants", "u1", 16)]), _q5_1
    ),
    8: BlockType("Q8_0", 32, np.dtype([("scale", "<f2"), ("quants", "i1", 32)]), _q8_0),
    12: BlockType(
        "Q4_K", 256, np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("parts", "u1", 12), ("quants", "u1", 128)]), _q4_k
    ),
    13: BlockType(
        "Q5_K",
        256,
        np.dtype(
            [("scale", "<f2"), ("minimum", "<f2"), ("parts", "u1", 12), ("high", "u1", 32), ("quants", "u1", 128)]
        ),
        _q5_k,
    ),
    14: BlockType(
        "Q6_K", 256, np.dtype([("quants", "u1", 128), ("high", "u1", 64), ("parts", "i1", 16), ("scale", "<f2")]), _q6_k
    ),
    30: BlockType("BF16", 1, np.dtype("<u2"), bfloat16.from_bits),
}

# The names of those that are not read, for the message that refuses them.
OTHER_TYPES: dict[int, str] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
