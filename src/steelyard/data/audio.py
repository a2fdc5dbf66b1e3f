"""Recordings with what is said in them: lists that name sound files; read, bounded, at 16 kHz in one channel.

    {"audio": "clips/1.ogg", "text": "good morning"}      JSONL, CSV or TSV; paths are relative to the list

What a sound file is: `sound.py`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from steelyard.data.chat import FormatConfig
from steelyard.data.readers import check_file, json_rows, table_rows
from steelyard.data.sound import ENDINGS, RATE, pieces
from steelyard.errors import ArtifactError, DataError

__all__ = ["ENDINGS", "RATE", "Recording", "Sounds", "digest", "listed", "read"]

MAX_BYTES = 256 << 20


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """A sound file, and what is said in it."""

    path: Path
    text: str | None
    file: Path
    """The list or folder that names it."""
    line: int | None = None


def listed(path: Path, config: FormatConfig) -> list[tuple[dict[str, Any], Recording]]:
    """All recordings of a list, or of a folder (then without texts), with the rows that name them; none is read yet.

    Raises:
        DataError: no such file, no row, or a row without a path; file, line and field are named.
    """
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in ENDINGS]
        found = [({config.audio: file.name}, Recording(path=file, text=None, file=path)) for file in files]
    else:
        check_file(path)
        tabular = path.suffix.lower() in (".csv", ".tsv")
        rows = table_rows(path, config.columns) if tabular else json_rows(path)
        found = [(row, _recording(row, path, line, config)) for line, row in rows]
    if not found:
        raise DataError("no recording is named", file=path)
    return found


def _recording(row: dict[str, Any], path: Path, line: int, config: FormatConfig) -> Recording:
    named, text = row.get(config.audio), row.get(config.text)
    if not isinstance(named, str) or not named.strip():
        reason = f"must be the path of a recording; the row has: {', '.join(row) or 'nothing'}"
        raise DataError(reason, file=path, line=line, field=config.audio)
    if text is not None and not isinstance(text, str):
        raise DataError("must be a text", file=path, line=line, field=config.text)
    return Recording(path=path.parent / named, text=text, file=path, line=line)


def digest(recording: Recording) -> str:
    """The sha256 of a recording's file. Raises DataError: it cannot be read, or is too large."""
    return hashlib.sha256(_bytes(recording)).hexdigest()


def _bytes(recording: Recording) -> bytes:
    where: dict[str, Any] = {"file": recording.file, "line": recording.line}
    try:
        with recording.path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"'{recording.path}' cannot be read: {reason}", **where) from None
    if len(content) > MAX_BYTES:
        raise DataError(f"'{recording.path}' is over {MAX_BYTES >> 20} MB", **where)
    return content


def read(recording: Recording) -> torch.Tensor:
    """Samples `[S]` float32 of 16 kHz, -1 to 1, the mean of all channels.

    Raises:
        DataError: it cannot be read, is of no known format, too large or too long.
        ConfigError: the libraries are not installed.
    """
    content = _bytes(recording)
    try:
        whole = np.concatenate(list(pieces(io.BytesIO(content))))
    except ArtifactError as error:
        raise DataError(f"'{recording.path}' {error}", file=recording.file, line=recording.line) from None
    return torch.from_numpy(whole)


class Sounds(Sequence[torch.Tensor]):
    """The samples of some recordings, each read when asked for. Raises as `read` does."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._recordings = recordings

    def __len__(self) -> int:
        return len(self._recordings)

    def __getitem__(self, number: Any) -> Any:
        return read(self._recordings[number])
