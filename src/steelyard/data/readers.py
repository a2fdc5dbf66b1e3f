"""Lines of JSONL, CSV and TSV, bounded and numbered, and the format that a file is in. Knows no meaning of fields."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steelyard.errors import ConfigError, DataError

MAX_LINE_BYTES = 8 << 20
PARQUET_ROWS = 16
"""Of a Parquet file that are held at a time."""
PARQUET = ".parquet"
FORMATS = ("chat", "instruction", "labelled", "text")
JSON_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
SAY_FORMAT = "set data.format (or --set format=...)"


def json_kind(value: object) -> str:
    """What JSON calls the kind of a value."""
    return JSON_KINDS.get(type(value), "a number")


def check_file(path: Path) -> None:
    """Refuse what is no file.

    Raises:
        DataError: nothing is there, or a folder.
    """
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "this is no regular file" if path.exists() else "no such file"
        raise DataError(f"{what}; give the path of a JSONL, CSV, TSV or text file", file=path)


def check_place(path: Path) -> None:
    """Refuse what is neither a file nor a folder that could hold images or recordings. Raises as `check_file` does."""
    if not (path.is_dir() and path.name and not path.suffix):
        check_file(path)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, without their ends; a BOM is dropped.

    Raises:
        DataError: no such file, a line over 8 MB, or bytes that are not UTF-8.
    """
    check_file(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}; check its permissions", file=path) from None
    with file:
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
    """Numbered JSON objects, one a line; blank lines are skipped. Of Parquet, its rows.

    Raises:
        DataError: a line that is none: see `json_row`.
    """
    if path.suffix.lower() == PARQUET:
        yield from parquet_rows(path)
        return
    for number, text in lines(path):
        if text.strip():
            yield number, json_row(text, path, number)


def json_row(text: str, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        DataError: a line that is not one JSON object, has a key twice, or holds what JSON cannot (NaN, half a
            surrogate pair).
    """
    try:
        row = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
        if not isinstance(row, dict):
            raise DataError(f"a JSON object is needed, not {json_kind(row)}")
        if "\\u" in text:
            _check_unicode(row)
    except DataError as error:
        raise DataError(error.reason, file=path, line=number, field=error.field) from None
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        reason = f"not JSON: {what} at column {error.colno}; each line must be one whole JSON object"
        raise DataError(reason, file=path, line=number) from None
    except ValueError:
        raise DataError("not JSON: a number has too many digits", file=path, line=number) from None
    except RecursionError:
        raise DataError("nested too deeply", file=path, line=number) from None
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError("is there twice; keep one", field=twice)
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DataError(f"not JSON: {text[:20]} is no finite number")
    return number


def _check_unicode(row: dict[str, Any]) -> None:
    for field, value in row.items():
        try:
            json.dumps([field, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            reason = "has a lone surrogate (\\ud800 to \\udfff); write well-formed Unicode"
            raise DataError(reason, field=field.encode(errors="replace").decode()) from None


def table_rows(path: Path, columns: tuple[str, ...] | None) -> Iterator[tuple[int, dict[str, str]]]:
    """Numbered rows of a CSV (quoted fields, which may span lines) or TSV (no quoting) file.

    Args:
        path: ends in .csv or .tsv.
        columns: names of the columns if the first line is no header.

    Raises:
        DataError: a row with more or fewer fields than the header, or broken quotes, by the line it begins in; a
            column that is there twice.
    """
    header = columns
    if header is not None:
        _check_header(header, path, None)
    for line, fields in _tab_fields(path) if path.suffix.lower() == ".tsv" else _comma_fields(path):
        if header is None:
            header = tuple(name.strip() for name in fields)
            _check_header(header, path, line)
            continue
        if len(fields) != len(header):
            reason = f"{len(fields)} fields where the header has {len(header)} ({', '.join(header)})"
            raise DataError(reason, file=path, line=line)
        yield line, dict(zip(header, fields, strict=True))


def _check_header(header: tuple[str, ...], path: Path, line: int | None) -> None:
    for name in header:
        if name and header.count(name) > 1:
            raise DataError(f"two columns have this name ({', '.join(header)})", file=path, line=line, field=name)


def _tab_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, text in lines(path):
        if text:
            yield number, text.split("\t")


def _comma_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    place = [0]

    def numbered() -> Iterator[str]:
        for number, text in lines(path):
            place[0] = number
            yield text + "\n"

    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(numbered(), strict=True)
    while True:
        first = place[0] + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The csv module goes on with advice for programmers after a dash.
            reason = f"not CSV: {str(error).partition(' - ')[0]}; quote a field that holds quotes or line ends"
            raise DataError(reason, file=path, line=first) from None
        if fields:
            yield first, fields


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of a Parquet file, a group at a time; columns of lists and structs become JSON's.

    Raises:
        DataError: no Parquet file, damaged, or a value that JSON has not.
        ConfigError: the library is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs a library: pip install 'steelyard[data]'") from None
    check_file(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                if batch.nbytes > PARQUET_ROWS * MAX_LINE_BYTES:
                    raise DataError(f"a row from {number + 1} on is over {MAX_LINE_BYTES >> 20} MB", file=path)
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: _plain(value, path, number, name) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise DataError(f"no Parquet file that can be read: {what}", file=path) from None


def _plain(value: Any, path: Path, number: int, field: str) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner, path, number, field) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner, path, number, field) for inner in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise DataError(f"a {type(value).__name__} is nothing that rows have", file=path, line=number, field=field)


def detect(path: Path) -> str:
    """The format of a file by its ending and, for JSONL, its first row.

    Raises:
        DataError: no such file, or nothing known; what is known is named.
    """
    check_file(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "labelled"
    if suffix in (".txt", ".md"):
        return "text"
    if suffix in (".jsonl", ".ndjson", PARQUET):
        for number, row in json_rows(path):
            for format_, field in (("chat", "messages"), ("instruction", "instruction")):
                if field in row:
                    return format_
            if "text" in row:
                return "labelled" if "label" in row else "text"
            reason = f"cannot tell the format: no field 'messages', 'instruction' or 'text'; {SAY_FORMAT}"
            raise DataError(reason, file=path, line=number)
        raise DataError("the file is empty", file=path)
    known = ".jsonl .csv .tsv .txt .parquet"
    raise DataError(f"cannot tell the format by the ending; known: {known}, or {SAY_FORMAT}", file=path)
