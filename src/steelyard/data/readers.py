"""Lines of JSONL, CSV and TSV, bounded and numbered, and the format that a file is in. Knows no meaning of fields."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steelyard.errors import DataError

MAX_LINE_BYTES = 8 << 20
FORMATS = ("chat", "instruction", "labelled", "text")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, without their ends; a BOM is dropped.

    Raises:
        DataError: no such file, a line over 8 MB, or bytes that are not UTF-8.
    """
    if not path.is_file():
        raise DataError("no such file; give the path of a JSONL, CSV, TSV or text file", file=path)
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(f"the line is over {MAX_LINE_BYTES >> 20} MB", file=path, line=number)
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"byte {error.start} is not UTF-8; save the file as UTF-8"
                raise DataError(reason, file=path, line=number) from None
            yield number, text.rstrip("\r\n")


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered JSON objects, one a line; blank lines are skipped.

    Raises:
        DataError: a line that is not one JSON object.
    """
    for number, text in lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            reason = f"not JSON: {error}"
            raise DataError(reason, file=path, line=number) from None
        except RecursionError:
            raise DataError("nested too deeply", file=path, line=number) from None
        if not isinstance(row, dict):
            raise DataError(f"a JSON object is needed, not {type(row).__name__}", file=path, line=number)
        yield number, row


def table_rows(path: Path, columns: tuple[str, ...] | None) -> Iterator[tuple[int, dict[str, str]]]:
    """Numbered rows of a CSV (quoted fields) or TSV (no quoting) file.

    Args:
        path: ends in .csv or .tsv.
        columns: names of the columns if the first line is no header.

    Raises:
        DataError: a row with more or fewer fields than the header.
    """
    tabs = path.suffix.lower() == ".tsv"
    place = [0]

    def numbered() -> Iterator[str]:
        for number, text in lines(path):
            place[0] = number
            yield text + "\n"

    if tabs:
        reader = csv.reader(numbered(), delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
    else:
        reader = csv.reader(numbered(), strict=True)
    csv.field_size_limit(MAX_LINE_BYTES)
    header = columns
    while True:
        first = place[0] + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"not CSV: {error}", file=path, line=place[0]) from None
        if not fields:
            continue
        if header is None:
            header = tuple(name.strip() for name in fields)
            continue
        if len(fields) != len(header):
            reason = f"{len(fields)} fields where the header has {len(header)} ({', '.join(header)})"
            raise DataError(reason, file=path, line=first)
        yield first, dict(zip(header, fields, strict=True))


def detect(path: Path) -> str:
    """The format of a file by its ending and, for JSONL, its first row.

    Raises:
        DataError: nothing known; what is known is named.
    """
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "labelled"
    if suffix in (".txt", ".md"):
        return "text"
    if suffix in (".jsonl", ".ndjson"):
        for number, row in json_rows(path):
            for format_, field in (("chat", "messages"), ("instruction", "instruction")):
                if field in row:
                    return format_
            if "text" in row:
                return "labelled" if "label" in row else "text"
            reason = "cannot tell the format: no field 'messages', 'instruction' or 'text'; set data.format"
            raise DataError(reason, file=path, line=number)
        raise DataError("the file is empty", file=path)
    raise DataError("cannot tell the format by the ending; known: .jsonl .csv .tsv .txt, or set data.format", file=path)
