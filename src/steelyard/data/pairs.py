"""Pairs of texts that belong together: a question and its answer, a title and its text.

{"anchor": "how do I pay", "positive": "Payment is by card."}     JSONL, CSV, TSV or Parquet
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from steelyard.data.chat import FormatConfig
from steelyard.data.readers import check_file, json_rows, table_rows
from steelyard.errors import DataError

FIELDS = ("anchor", "positive")


class TextPair(msgspec.Struct, frozen=True, kw_only=True):
    """A row."""

    anchor: str
    positive: str
    file: Path
    line: int


def read(path: Path, config: FormatConfig) -> list[TextPair]:
    """All pairs of a file.

    Raises:
        DataError: a row without both texts, or no row; file, line and field are named.
    """
    check_file(path)
    tabular = path.suffix.lower() in (".csv", ".tsv")
    found = []
    for line, row in table_rows(path, config.columns) if tabular else json_rows(path):
        for field in FIELDS:
            if not isinstance(row.get(field), str) or not row[field].strip():
                reason = f"must be a text that is not empty; the row has: {', '.join(row) or 'nothing'}"
                raise DataError(reason, file=path, line=line, field=field)
        found.append(TextPair(anchor=row["anchor"].strip(), positive=row["positive"].strip(), file=path, line=line))
    if not found:
        raise DataError("the file has no rows", file=path)
    return found
