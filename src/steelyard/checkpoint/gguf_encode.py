"""How numbers become GGUF's blocks: rounded to a type, or integers that a checkpoint has, kept as they are.

Knows nothing of files or names; the other way is `gguf_blocks.py`.

Source: `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref` in ggml's `ggml-quants.c`.
"""

# N rows  M columns  G groups of columns  B blocks of 32 values

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.checkpoint import bfloat16
from steelyard.checkpoint.gguf_blocks import BLOCK_TYPES
from steelyard.errors import CheckpointError, ConfigError

BLOCK = 32
NUMBERS = {block.name: number for number, block in BLOCK_TYPES.items()}
"""ggml's number of a type, by its name."""
LEAST_BITS = {"Q8_0": 8, "Q4_0": 4}
"""Types of integers, and of how many bits these may be."""


def encode(values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Round float32 `[N, M]` to a type, as llama.cpp does; M is a multiple of what a block of it holds.

    Returns:
        The blocks in their order, as `BLOCK_TYPES` lays them out.

    Raises:
        CheckpointError: a value that is no number.
        ConfigError: one beyond what the type holds.
    """
    if not np.isfinite(values).all():
        raise CheckpointError("has values that are not finite: its training failed")
    return ENCODERS[kind](values)


def keep(values: NDArray[np.int8], scales: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Integers as blocks of a type of integers; only their scales are rounded, to float16.

    Args:
        values: `[N, M]`, of no more bits than the type has.
        scales: `[N, G]`; `fits` says whether groups are whole blocks.
        kind: a type of `LEAST_BITS`.

    Raises:
        ConfigError: a scale that float16 does not hold.
    """
    blocks = np.repeat(scales.reshape(-1), values.shape[1] // scales.shape[1] // BLOCK)
    return _records(kind, blocks, values.reshape(-1, BLOCK))


def fits(bits: int, group: int, kind: str) -> bool:
    """Whether `keep` can be asked for integers of so many bits, of which so many share a scale."""
    return bits <= LEAST_BITS.get(kind, 0) and group % BLOCK == 0


def _f32(values: NDArray[np.float32]) -> NDArray[Any]:
    return values.astype("<f4")


def _bf16(values: NDArray[np.float32]) -> NDArray[Any]:
    return bfloat16.to_bits(values).astype("<u2")


def _f16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halves: NDArray[np.float16] = values.astype("<f2")
    if not np.isfinite(halves).all():
        largest = np.abs(values).max()
        raise ConfigError(f"has values up to {largest:.3g}, which float16 does not hold: choose bf16 or f32")
    return halves


def _q8_0(values: NDArray[np.float32]) -> NDArray[Any]:
    blocks = values.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1) / np.float32(127)
    scaled = blocks * _inverse(scales)[:, None]
    size = np.abs(scaled)
    down = np.floor(size)
    nearest = np.copysign(down + np.floor(2 * (size - down)), scaled)  # halves away from 0
    return _records("Q8_0", scales, nearest.astype(np.int8))


def _q4_0(values: NDArray[np.float32]) -> NDArray[Any]:
    blocks = values.reshape(-1, BLOCK)
    widest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    scales = widest / np.float32(-8)  # the widest becomes -8, of which there is no opposite
    codes = np.trunc(blocks * _inverse(scales)[:, None] + np.float32(8.5)).clip(0, 15)
    return _records("Q4_0", scales, codes.astype(np.int8) - np.int8(8))


def _inverse(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / scale, and 0 of 0; of one too small for that the largest number."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(scales == 0, np.float32(0), np.nan_to_num(np.float32(1) / scales))


def _records(kind: str, scales: NDArray[np.float32], values: NDArray[np.int8]) -> NDArray[Any]:
    """Scales `[B]` and values `[B, 32]` -> `[B]` blocks."""
    records = np.empty(len(values), BLOCK_TYPES[NUMBERS[kind]].layout)
    records["scale"] = _f16(scales)
    if kind == "Q8_0":
        records["quants"] = values
    else:
        codes = (values + np.int8(8)).astype(np.uint8)
        records["quants"] = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4
    return records


ENCODERS: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
}
