"""Images with their labels: folders of them, or lists that name them; read, bounded, fitted into a square.

    photos/cat/1.png                                      a folder for each label; beside these, images without one
    {"image": "photos/1.png", "label": "cat"}             JSONL, CSV or TSV; paths are relative to the list

What is decoded, and how it is bounded, is in `picture.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from steelyard.data import picture
from steelyard.data.chat import FormatConfig
from steelyard.data.readers import check_file, json_rows, table_rows
from steelyard.errors import ArtifactError, DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MAX_BYTES = 64 << 20
LISTS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


class ImageRow(msgspec.Struct, frozen=True, kw_only=True):
    """An image file, and what it shows."""

    path: Path
    label: str | None
    file: Path
    """The list or folder that names it."""
    line: int | None = None


def listed(path: Path, fields: FormatConfig) -> list[ImageRow]:
    """All images of a folder of folders, or of a list; nothing of them is read yet.

    Raises:
        DataError: no such file, no row, or a row without a path; file, line and field are named.
    """
    rows = _folders(path) if path.is_dir() else _list(path, fields)
    if not rows:
        what = f"no image in its folders; an image ends in {', '.join(ENDINGS)}" if path.is_dir() else "no rows"
        raise DataError(what, file=path)
    return rows


def _folders(path: Path) -> list[ImageRow]:
    folders = [(folder, folder.name) for folder in sorted(path.iterdir()) if folder.is_dir()]
    return [
        ImageRow(path=image, label=label, file=path)
        for folder, label in ((path, None), *folders)
        for image in sorted(folder.iterdir())
        if image.suffix.lower() in ENDINGS
    ]


def _list(path: Path, fields: FormatConfig) -> list[ImageRow]:
    return [row_of(row, path, line, fields) for line, row in plain_rows(path, fields)]


def plain_rows(path: Path, fields: FormatConfig) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a list as they stand; of a folder, one that names each of its images. Raises as `listed` does."""
    if path.is_dir():
        named = (str(row.path.relative_to(path)) for row in _folders(path))
        return [(number, {fields.image: name}) for number, name in enumerate(named, 1)]
    check_file(path)
    if path.suffix.lower() not in LISTS:
        raise DataError(f"images come as a folder of folders, or as a list ({', '.join(LISTS)})", file=path)
    return list(table_rows(path, fields.columns) if path.suffix.lower() in (".csv", ".tsv") else json_rows(path))


def row_of(row: dict[str, Any], path: Path, line: int, fields: FormatConfig) -> ImageRow:
    """An image that a row names; its label is None where it has none.

    Raises:
        DataError: the row has no path.
    """
    named, label = row.get(fields.image), row.get(fields.label)
    if not isinstance(named, str) or not named.strip():
        reason = f"must be the path of an image; the row has: {', '.join(row) or 'nothing'}"
        raise DataError(reason, file=path, line=line, field=fields.image)
    if label is not None and (isinstance(label, dict | list) or not str(label).strip()):
        raise DataError("must be a text or a number", file=path, line=line, field=fields.label)
    shown = None if label is None else str(label).strip()
    return ImageRow(path=path.parent / named, label=shown, file=path, line=line)


def digest(row: ImageRow) -> str:
    """The sha256 of an image's file.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    return hashlib.sha256(_bytes(row)).hexdigest()


def read(row: ImageRow, channels: int, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image `[channels, side, side]`: turned as its camera says, transparent parts white, scaled to fit, centred.

    Raises:
        DataError: it cannot be read, is no image that is known here, or is too large.
    """
    try:
        return picture.fitted(_bytes(row), channels, side)
    except ArtifactError as error:
        raise DataError(f"'{row.path}' {error}", **_where(row)) from None


class ImageTensors(Sequence[torch.Tensor]):
    """The images of some rows, `[channels, side, side]` uint8, read when asked for. Raises as `read` does."""

    def __init__(self, rows: Sequence[ImageRow], channels: int, side: int) -> None:
        self._rows, self._channels, self._side = rows, channels, side

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        return torch.from_numpy(np.array(read(self._rows[number], self._channels, self._side)))


def readable(
    rows: Sequence[ImageRow],
    most_bad: int,
    look: Callable[[ImageRow], Any],
    note: Callable[[str], None],
) -> tuple[list[ImageRow], list[Any]]:
    """The rows that `look` takes, with what it makes of them; up to `most_bad` others are told to `note` and left out.

    Raises:
        DataError: one file more than that cannot be read.
    """
    kept, made, bad = [], [], 0
    for row in rows:
        try:
            made.append(look(row))
            kept.append(row)
        except DataError as error:
            bad += 1
            if bad > most_bad:
                advice = "mend it, or let so many be left out by data.bad_files"
                raise DataError(f"{error.reason} ({bad} such; {advice})", **_where(row)) from None
            note(f"left out: {error}")
    return kept, made


def _bytes(row: ImageRow) -> bytes:
    try:
        with row.path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"'{row.path}' cannot be read: {reason}", **_where(row)) from None
    if len(content) > MAX_BYTES:
        raise DataError(f"'{row.path}' is over {MAX_BYTES >> 20} MB", **_where(row))
    return content


def _where(row: ImageRow) -> dict[str, Any]:
    return {"file": row.file, "line": row.line}
