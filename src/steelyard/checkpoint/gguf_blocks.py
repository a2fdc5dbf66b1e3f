"""How GGUF stores numbers: for each type its block, and the vectorised step from blocks to float32.

Knows nothing of files or names. A further type is one entry in `BLOCK_TYPES`.

Source: the block layouts in ggml's `ggml-common.h` and `dequantize_row_*` in `ggml-quants.c`.
"""

# N blocks  32 values in a block of the quantised types

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


# ggml's number -> the type.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, np.dtype("<f4"), _float),
    1: BlockType("F16", 1, np.dtype("<f2"), _float),
    2: BlockType("Q4_0", 32, np.dtype([("scale", "<f2"), ("quants", "u1", 16)]), _q4_0),
    3: BlockType("Q4_1", 32, np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("quants", "u1", 16)]), _q4_1),
    8: BlockType("Q8_0", 32, np.dtype([("scale", "<f2"), ("quants", "i1", 32)]), _q8_0),
    30: BlockType("BF16", 1, np.dtype("<u2"), bfloat16.from_bits),
}

# The names of those that are not read, for the message that refuses them.
OTHER_TYPES: dict[int, str] = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
