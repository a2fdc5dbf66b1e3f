"""bfloat16 without a bfloat16 type: numpy has none, so its bits travel as uint16.

Knows nothing of files or tensors' names.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, nearest even; the result holds the bits, same shape.

    A NaN stays a NaN (its quiet bit is set, so that dropping the low half cannot turn it into infinity).
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = ((bits[nan] >> 16) | 0x40).astype(np.uint16)
    return rounded


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values, exact, of bfloat16 bits; same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
