"""CTranslate2's model.bin: every length checked against the file before it is believed, tensors mapped.

Knows bytes, dtypes and shapes; nothing of models, and no torch.

    u32 version | text specification | u32 revision
    u32 count | count x (text name, u8 rank, rank x u32 size, u8 dtype, u32 bytes, the values)
    u32 count | count x (text alias, text name)                 a text: u16 length, the bytes, the last of them 0

Source: CTranslate2, python/ctranslate2/specs/model_spec.py.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.errors import ArtifactError

VERSIONS = range(4, 7)
MAX_TENSORS = 100_000
MAX_TEXT = 1024
MAX_RANK = 8
DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
    5: np.dtype("<u2"),  # bfloat16, which numpy has not
}


def recognised(path: Path) -> bool:
    """Whether a file begins as one of these does."""
    with path.open("rb") as file:
        start = file.read(64)
    if len(start) < 8:
        return False
    version, length = struct.unpack_from("<IH", start)
    name = start[6 : 6 + length]
    return version in VERSIONS and len(name) == length and name.endswith(b"Spec\0")


class CTranslate2:
    """A model file, mapped.

    Args:
        path: of model.bin.

    Raises:
        ArtifactError: it is none, cut off, or lies about a length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:  # an empty file cannot be mapped
                raise ArtifactError(f"'{path}' is empty") from None
        self._at = 0
        version = self._number("<I")
        self.specification = self._text()
        if version not in VERSIONS or not self.specification.endswith("Spec"):
            raise ArtifactError(f"'{path}' is no CTranslate2 model of a version that is known here")
        self.revision = self._number("<I")
        self.tensors = dict(self._tensor() for _ in range(self._count()))
        """By name; a scalar has the shape ()."""
        for _ in range(self._count()):
            alias, name = self._text(), self._text()
            if name not in self.tensors or alias in self.tensors:
                raise ArtifactError(f"'{path}': alias {alias[:100]!a} does not fit its tensors")
            self.tensors[alias] = self.tensors[name]
        if self._at != len(self._bytes):
            raise ArtifactError(f"'{path}' goes on after its last tensor: it is damaged")

    def _tensor(self) -> tuple[str, NDArray[Any]]:
        name, rank = self._text(), self._number("<B")
        if rank > MAX_RANK:
            raise ArtifactError(f"'{self.path}': tensor {name[:100]!a} has {rank} dimensions")
        shape = tuple(self._number("<I") for _ in range(rank))
        kind, size = self._number("<B"), self._number("<I")
        if kind not in DTYPES or math.prod(shape) * DTYPES[kind].itemsize != size:
            raise ArtifactError(f"'{self.path}': tensor {name[:100]!a} is not as long as its shape and type say")
        start = self._skip(size)
        return name, np.frombuffer(self._bytes, DTYPES[kind], math.prod(shape), start).reshape(shape)

    def _count(self) -> int:
        count = self._number("<I")
        if count > MAX_TENSORS:
            raise ArtifactError(f"'{self.path}' says that it has {count} entries: it is damaged")
        return count

    def _number(self, form: str) -> int:
        start = self._skip(struct.calcsize(form))
        found: int = struct.unpack_from(form, self._bytes, start)[0]
        return found

    def _text(self) -> str:
        length = self._number("<H")
        if not 1 <= length <= MAX_TEXT:
            raise ArtifactError(f"'{self.path}' has a name of {length} bytes: it is damaged")
        start = self._skip(length)
        raw = self._bytes[start : start + length]
        if raw[-1] != 0 or not raw[:-1].isascii():
            raise ArtifactError(f"'{self.path}' has a name that is no plain text: it is damaged")
        return raw[:-1].decode("ascii")

    def _skip(self, size: int) -> int:
        """Go on by so many bytes, which must be there; returns where they begin."""
        start = self._at
        if size > len(self._bytes) - start:
            raise ArtifactError(f"'{self.path}' ends in the middle of a tensor: it is cut off")
        self._at = start + size
        return start
