"""Rows of several kinds at once: a text, an image, a recording, any of them missing, and a label.

{"text": "a red kite", "image": "1.png", "audio": "1.ogg", "label": "birds"}     JSONL, CSV or TSV
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from steelyard.data.audio import Recording
from steelyard.data.chat import FormatConfig
from steelyard.data.images import ImageRow
from steelyard.data.readers import check_file, json_rows, table_rows
from steelyard.errors import DataError


class FusedRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a row has."""

    text: str | None
    image: ImageRow | None
    audio: Recording | None
    label: str | None
    file: Path
    line: int
    fields: dict[str, Any]
    """As it stands."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two rows the same example."""
        return (self.text or "", str(self.image and self.image.path), str(self.audio and self.audio.path))


def read(path: Path, config: FormatConfig, modalities: tuple[str, ...]) -> list[FusedRow]:
    """All rows of a file; its images and recordings are not read yet.

    Raises:
        DataError: no row, or one with none of the modalities, or a field that is no text; file and line are named.
    """
    check_file(path)
    tabular = path.suffix.lower() in (".csv", ".tsv")
    rows = table_rows(path, config.columns) if tabular else json_rows(path)
    found = [_row(row, path, line, config, modalities) for line, row in rows]
    if not found:
        raise DataError("the file has no rows", file=path)
    return found


def _row(row: dict[str, Any], path: Path, line: int, config: FormatConfig, modalities: tuple[str, ...]) -> FusedRow:
    named: dict[str, str | None] = {}
    for name in (*modalities, "label"):
        field = getattr(config, name)
        value = row.get(field)
        if isinstance(value, int) and name == "label" and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise DataError("must be a text", file=path, line=line, field=field)
        named[name] = value.strip() if value and value.strip() else None
    if not any(named[name] for name in modalities):
        fields = ", ".join(getattr(config, name) for name in modalities)
        raise DataError(f"none of {fields} is there", file=path, line=line)
    image, audio = named.get("image"), named.get("audio")
    return FusedRow(
        text=named.get("text"),
        image=None if image is None else ImageRow(path=path.parent / image, label=None, file=path, line=line),
        audio=None if audio is None else Recording(path=path.parent / audio, text=None, file=path, line=line),
        label=named["label"],
        file=path,
        line=line,
        fields=row,
    )
