"""A GGUF file, versions 2 and 3, read without believing any length that stands in it.

Knows the container and its numbers; nothing of architectures or tokenizers, and no torch. The file is mapped: opening
it reads only the header, and a tensor is decoded when it is asked for, whole or by rows. Every count and length is
checked against the bytes that are left before anything is allocated.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from steelyard.checkpoint.gguf_blocks import BLOCK_TYPES, OTHER_TYPES, BlockType
from steelyard.errors import ArtifactError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 1 << 12
MAX_OBJECTS = 1 << 22
"""Most strings and arrays in all the metadata together: bounds what Python objects can be made of a file."""
MAX_DEPTH = 4
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
SMALLEST_PAIR = 8 + 4 + 1
SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

Value = int | float | bool | str | list[Any] | NDArray[Any]


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor that is not decoded yet. `shape` is numpy's: outermost first, so the reverse of the file's."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    begin: int
    end: int
    bytes: NDArray[np.uint8]

    @property
    def rows(self) -> int:
        """Rows of the last dimension; 1 for a vector."""
        return math.prod(self.shape[:-1])

    def read(self) -> NDArray[np.float32]:
        """All of it, float32 of `shape`."""
        return self.read_rows(0, self.rows).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop` (exclusive, cut to what is there), float32 `[rows, shape[-1]]`."""
        stop = min(stop, self.rows)
        stride = self.bytes.size // self.rows
        records = self.bytes[start * stride : stop * stride].view(self.type.layout)
        return self.type.decode(records).reshape(stop - start, self.shape[-1])


class GGUF:
    """An open file: `metadata` by key, `tensors` by name.

    Metadata values are Python scalars and strings; arrays of numbers are numpy arrays, arrays of strings or of
    arrays are lists.

    Raises:
        ArtifactError: truncated, lying, malformed, or with a tensor type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 24:
                    self._refuse("is cut short or no GGUF file")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.size = len(self._map)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"'{path}' cannot be read: {error}") from None
        self._at = 0
        self._objects = 0
        self._read()

    def _refuse(self, what: str) -> NoReturn:
        raise ArtifactError(f"'{self.path}' {what}")

    def _read(self) -> None:
        if self._take(4, "the magic") != MAGIC:
            self._refuse("is no GGUF file: it does not start with 'GGUF'")
        version = self._integer("<I", "the version")
        if version not in VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            self._refuse("is a big-endian GGUF" if big_endian else f"is GGUF version {version}; 2 and 3 are read")
        tensors = self._count("tensors", SMALLEST_TENSOR, MAX_TENSORS)
        for _ in range(self._count("metadata keys", SMALLEST_PAIR, MAX_KEYS)):
            key = self._string("a metadata key", MAX_NAME_BYTES)
            if key in self.metadata:
                self._refuse(f"has the metadata key '{_line(key)}' twice")
            self.metadata[key] = self._value(self._integer("<I", f"the type of '{_line(key)}'"), key, 0)
        infos = [self._tensor_info() for _ in range(tensors)]
        self._place(infos, self._alignment())

    def _take(self, length: int, what: str) -> bytes:
        if length > self.size - self._at:
            self._refuse(f"ends inside {what}: it is cut short or lies about a length")
        self._at += length
        return self._map[self._at - length : self._at]

    def _integer(self, form: str, what: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form), what))[0]
        return value

    def _count(self, what: str, smallest: int, most: int) -> int:
        count = self._integer("<Q", f"the number of {what}")
        if count > most or count * smallest > self.size - self._at:
            self._refuse(f"claims {count} {what}, more than it can hold")
        return count

    def _string(self, what: str, most: int | None = None) -> str:
        length = self._integer("<Q", what)
        if most is not None and length > most:
            self._refuse(f"claims {length} bytes for {what}; at most {most} are read")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            return self._refuse(f"has text that is not UTF-8 in {what}")

    def _value(self, kind: int, key: str, depth: int) -> Value:
        what = f"metadata '{_line(key)}'"
        if kind == STRING:
            return self._string(what)
        if kind == ARRAY:
            return self._array(key, depth)
        if kind not in SCALARS:
            self._refuse(f"has an unknown type {kind} in {what}")
        scalar = np.dtype(SCALARS[kind])
        value: int | float = np.frombuffer(self._take(scalar.itemsize, what), scalar)[0].item()
        return self._boolean(value, what) if kind == BOOL else value

    def _boolean(self, value: float, what: str) -> bool:
        if value not in (0, 1):
            self._refuse(f"has a boolean that is neither 0 nor 1 in {what}")
        return value == 1

    def _array(self, key: str, depth: int) -> Value:
        what = f"metadata '{_line(key)}'"
        kind = self._integer("<I", what)
        count = self._integer("<Q", what)
        if kind in SCALARS:
            scalar = np.dtype(SCALARS[kind])
            values = np.frombuffer(self._take(count * scalar.itemsize, what), scalar)
            return values != 0 if kind == BOOL else values
        if kind not in (STRING, ARRAY):
            self._refuse(f"has an array of an unknown type {kind} in {what}")
        if depth == MAX_DEPTH:
            self._refuse(f"nests arrays over {MAX_DEPTH} deep in {what}")
        self._objects += count
        if self._objects > MAX_OBJECTS or count * (8 if kind == STRING else 12) > self.size - self._at:
            self._refuse(f"claims {count} elements in {what}, more than it can hold")
        return [self._value(kind, key, depth + 1) for _ in range(count)]

    def _tensor_info(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name = self._string("a tensor's name", MAX_NAME_BYTES)
        what = f"tensor '{_line(name)}'"
        dimensions = self._integer("<I", what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self._refuse(f"gives {what} {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are read")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions, what))
        number, offset = struct.unpack("<IQ", self._take(12, what))
        block = BLOCK_TYPES.get(number)
        if block is None:
            known = ", ".join(entry.name for entry in BLOCK_TYPES.values())
            kind = OTHER_TYPES.get(number, f"unknown type {number}")
            self._refuse(f"stores {what} as {kind}; read are {known}: take the file in one of these")
        if min(shape) < 1 or math.prod(shape) > self.size * block.values:
            self._refuse(f"gives {what} the shape {list(shape)}, which the file cannot hold")
        if shape[0] % block.values:
            self._refuse(f"gives {what} rows of {shape[0]} values, not a multiple of {block.name}'s {block.values}")
        return name, block, tuple(reversed(shape)), offset

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        power = isinstance(alignment, int) and not isinstance(alignment, bool) and alignment.bit_count() == 1
        if not isinstance(alignment, int) or not power or not 1 <= alignment <= MAX_ALIGNMENT:
            self._refuse(f"has an alignment that is no power of two up to {MAX_ALIGNMENT}")
        return alignment

    def _place(self, infos: list[tuple[str, BlockType, tuple[int, ...], int]], alignment: int) -> None:
        data = self._at + -self._at % alignment
        mapped = np.frombuffer(self._map, np.uint8)
        for name, block, shape, offset in infos:
            what = f"tensor '{_line(name)}'"
            begin, length = data + offset, math.prod(shape) // block.values * block.layout.itemsize
            if name in self.tensors:
                self._refuse(f"has {what} twice")
            if offset % alignment:
                self._refuse(f"puts {what} at {offset}, which is not aligned to {alignment}")
            if begin + length > self.size:
                self._refuse(f"ends inside {what}: it is cut short or lies about its size")
            self.tensors[name] = GGUFTensor(name, block, shape, begin, begin + length, mapped[begin : begin + length])
        end = 0
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.begin):
            if tensor.begin < end:
                self._refuse(f"has tensor '{_line(tensor.name)}' overlapping another")
            end = tensor.end


def _line(name: str) -> str:
    """`name` as one short line for a message."""
    return " ".join(name.split())[:100]
