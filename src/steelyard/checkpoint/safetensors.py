"""The safetensors format: a header checked against every bound before it is believed, mapped reads, a streaming writer.

Knows bytes, dtypes and shapes; nothing of models, and no torch. BF16 and the 8-bit floats, which numpy has not, travel
as unsigned integers of their width.

    8 bytes little-endian header length N | N bytes of JSON | the tensors' bytes, without holes or overlaps

Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steelyard.atomic import file_aside
from steelyard.errors import ArtifactError

MAX_HEADER_BYTES = 100_000_000
MAX_STRUCTURE = 4_000_000
"""Most commas, colons and brackets in a header: bounds what parsing it can allocate."""
MAX_DIMENSIONS = 32

# Format name -> numpy dtype that holds it.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "F8_E4M3": np.dtype("<u1"),
    "F8_E5M2": np.dtype("<u1"),
    "F8_E8M0": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}

Bytes = bytes | bytearray | memoryview | NDArray[Any]
Content = Bytes | Callable[[], Bytes | Iterable[Bytes]]


class TensorInfo(NamedTuple):
    """Where a tensor lies: `begin` and `end` are offsets from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Tensor(NamedTuple):
    """A tensor to be written: its bytes, or what gives them, whole or in pieces, when it is its turn."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Content


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        ArtifactError: truncated, lying or malformed; the file and the tensor are named.
    """
    return _parse(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The file's `__metadata__`, empty if it has none. Raises as `read_header`."""
    return _parse(path)[1]


def read(path: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of a file as a read-only view of the mapped file: nothing is loaded until it is touched.

    BF16 and the 8-bit floats are their bits as uint16 and uint8. Raises as `read_header`.
    """
    header = read_header(path)
    if not any(info.end > info.begin for info in header.values()):
        return {name: np.zeros(info.shape, DTYPES[info.dtype]) for name, info in header.items()}
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    return {
        name: mapped[info.begin : info.end].view(DTYPES[info.dtype]).reshape(info.shape)
        for name, info in header.items()
    }


def write(
    target: Path | BinaryIO, tensors: Iterable[tuple[str, str, tuple[int, ...], Content]], metadata: Mapping[str, str]
) -> None:
    """Write a file without ever holding more than one tensor, or one piece of it.

    Args:
        target: a path (written whole or not at all) or an open binary file.
        tensors: `(name, dtype, shape, content)`. They are laid out widest dtype first, else in the given order,
            so that each is aligned to its items.
        metadata: free strings; `{"format": "pt"}` is what transformers expects.

    Raises:
        ValueError: a tensor's bytes are not as many as its shape and dtype say: a bug of the caller.
    """
    if isinstance(target, Path):
        with file_aside(target) as file:
            write(file, tensors, metadata)
        return
    ordered = sorted((Tensor(*tensor) for tensor in tensors), key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    sizes, offset = [], 0
    for tensor in ordered:
        if tensor.name in header or tensor.name == "__metadata__":
            raise ValueError(f"tensor '{tensor.name}' is given twice or has a reserved name")
        sizes.append(math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + sizes[-1]],
        }
        offset += sizes[-1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    target.write(len(raw).to_bytes(8, "little") + raw)
    for tensor, size in zip(ordered, sizes, strict=True):
        written = 0
        for piece in _pieces(tensor.content):
            flat = _flat(piece)
            written += flat.nbytes
            if written > size:
                break
            target.write(flat)
        if written != size:
            raise ValueError(f"tensor '{tensor.name}' has {written} bytes where its shape and dtype say {size}")


def _flat(piece: Bytes) -> memoryview:
    """The bytes of `piece`, in C order."""
    if isinstance(piece, np.ndarray):
        return memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    return memoryview(piece)


def _pieces(content: Content) -> Iterable[Bytes]:
    given = content() if callable(content) else content
    return [given] if isinstance(given, bytes | bytearray | memoryview | np.ndarray) else given


def _parse(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise ArtifactError(f"'{path}' is cut short or no safetensors file: its header does not fit in it")
            if length > MAX_HEADER_BYTES:
                raise ArtifactError(f"'{path}' claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
            raw = file.read(length)
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror}") from None
    header = _decode(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError(f"'{path}': __metadata__ is not an object of strings")
    data = 8 + length
    tensors = [(name, _tensor(path, name, entry, data, size)) for name, entry in header.items()]
    tensors.sort(key=lambda item: (item[1].begin, item[1].end))
    expected = data
    for name, info in tensors:
        if info.begin != expected:
            problem = "overlaps another tensor" if info.begin < expected else "leaves a hole before it"
            raise ArtifactError(f"'{path}': tensor '{_line(name)}' {problem}")
        expected = info.end
    if expected != size:
        raise ArtifactError(f"'{path}' has {size - expected} bytes after its last tensor: it is damaged")
    return dict(tensors), metadata


def _decode(path: Path, raw: bytes) -> dict[str, Any]:
    if sum(raw.count(mark) for mark in (b",", b":", b"[", b"{")) > MAX_STRUCTURE:
        raise ArtifactError(f"'{path}': the header has over {MAX_STRUCTURE} values; this is no model's header")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name stands twice")
        return entries

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}': the header is not valid JSON: {_line(error)}") from None
    if not isinstance(header, dict):
        raise ArtifactError(f"'{path}': the header is not a JSON object")
    return header


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    where = f"'{path}': tensor '{_line(name)}'"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactError(f"{where} has a dtype that is not read: {_line(repr(dtype))}; known: {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ArtifactError(f"{where} has a shape that is not up to {MAX_DIMENSIONS} non-negative integers")
    if not _counts(span) or len(span) != 2:
        raise ArtifactError(f"{where} has data_offsets that are not two non-negative integers")
    begin, end = span
    if begin > end or end > size - data:
        raise ArtifactError(f"{where} lies outside the file: the file is cut short or its header lies")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ArtifactError(f"{where} spans {end - begin} bytes, which is not what its shape and dtype take")
    return TensorInfo(dtype, tuple(shape), data + begin, data + end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _line(value: object) -> str:
    """`value` as one short line for a message."""
    return " ".join(str(value).split())[:200].encode("utf-8", "backslashreplace").decode()
