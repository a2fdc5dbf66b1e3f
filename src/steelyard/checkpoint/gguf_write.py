"""Writes a GGUF file, version 3: whole or not at all, and never holding more than a piece of a tensor.

Knows the container, as `gguf.py` does; nothing of architectures or tokenizers.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steelyard.atomic import file_aside
from steelyard.checkpoint.gguf import ARRAY, BOOL, MAGIC, SCALARS, STRING, Value
from steelyard.checkpoint.gguf_blocks import BLOCK_TYPES
from steelyard.checkpoint.gguf_encode import NUMBERS

VERSION = 3
ALIGNMENT = 32
U32, F32 = 4, 6


class Tensor(NamedTuple):
    """A tensor to be written. `shape` is numpy's: outermost first."""

    name: str
    kind: str
    """A name of `BLOCK_TYPES`."""
    shape: tuple[int, ...]
    content: Callable[[], Iterable[NDArray[Any]]]
    """Gives its blocks, in pieces, when it is its turn."""

    @property
    def bytes(self) -> int:
        """How many its blocks take."""
        block = BLOCK_TYPES[NUMBERS[self.kind]]
        return math.prod(self.shape) // block.values * block.layout.itemsize


def write(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> None:
    """Write a file.

    Args:
        path: where.
        metadata: by key; integers are stored in 32 bits without a sign, numbers in float32, arrays of numbers by their
            dtype.
        tensors: in the order of their bytes.

    Raises:
        OSError: it cannot be written there.
        ValueError: a tensor's blocks are not as many as its shape and type say: a bug of the caller.
    """
    with file_aside(path) as file:
        head = b"".join(
            [
                MAGIC,
                struct.pack("<IQQ", VERSION, len(tensors), len(metadata)),
                *(_string(key) + _value(value) for key, value in metadata.items()),
                *_infos(tensors),
            ]
        )
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for tensor in tensors:
            _write(file, tensor)


def _write(file: BinaryIO, tensor: Tensor) -> None:
    written = 0
    for piece in tensor.content():
        file.write(piece.tobytes())
        written += piece.nbytes
    if written != tensor.bytes:
        raise ValueError(f"tensor '{tensor.name}' has {written} bytes where its shape and type say {tensor.bytes}")
    file.write(bytes(-written % ALIGNMENT))


def _infos(tensors: Iterable[Tensor]) -> Iterable[bytes]:
    offset = 0
    for tensor in tensors:
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        yield _string(tensor.name) + sizes + struct.pack("<IQ", NUMBERS[tensor.kind], offset)
        offset += tensor.bytes + -tensor.bytes % ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, np.ndarray):
        kind = next(number for number, name in SCALARS.items() if np.dtype(name) == value.dtype and number != BOOL)
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + value.tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
