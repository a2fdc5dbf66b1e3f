"""A multipart form as it comes in: its one file goes on piece by piece, its other fields are short."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from typing import TYPE_CHECKING

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

from steelyard.errors import RequestError

MOST_FIELDS, MOST_VALUE, MOST_HEADER, MOST_NAME = 16, 4096, 8192, 255
TOGETHER = 1 << 20
"""Bytes that are handed on at once."""


class Upload:
    """Reads a form.

    Args:
        content_type: the request's header.
        write: takes the file's content; runs in the thread that feeds.
        several: names of fields that may be there several times.

    Raises:
        RequestError: it is no multipart form.
    """

    def __init__(self, content_type: str, write: Callable[[bytes], object], several: Collection[str] = ()) -> None:
        kind, options = parse_options_header(content_type.encode("latin-1", "replace"))
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise RequestError("the body must be a form, multipart/form-data, with a boundary", code="invalid_form")
        self.fields: dict[str, str] = {}
        self.lists: dict[str, list[str]] = {}
        """Those that may be there several times."""
        self.filename: str | None = None
        """The file's own name, once its part has begun."""
        self._write, self._several = write, several
        self._header, self._value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._name, self._is_file, self._parts, self._ended = "", False, 0, False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_end": self._finish,
        }
        self._parser = python_multipart.MultipartParser(options[b"boundary"], callbacks)

    def feed(self, content: bytes) -> None:
        """Take in some of the body.

        Raises:
            RequestError: it is broken, has two files, or too many or too long fields.
        """
        try:
            self._parser.write(content)
        except FormParserError as error:
            raise RequestError(f"the form is broken: {error}", code="invalid_form") from None

    def close(self) -> None:
        """That was all.

        Raises:
            RequestError: the form is cut off, or has no file.
        """
        if not self._ended:
            raise RequestError("the form is cut off: its last boundary is missing", code="invalid_form")
        if self.filename is None:
            raise RequestError("'file' is missing", param="file", code="missing_required_parameter")

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_FIELDS:
            raise RequestError(f"the form has more than {MOST_FIELDS} fields", code="invalid_form")
        self._headers, self._value = {}, bytearray()
        self._header, self._header_content = bytearray(), bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header(self._header)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_content += data[start:end]
        self._check_header(self._header_content)

    def _header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._header_content)
        self._header, self._header_content = bytearray(), bytearray()
        if len(self._headers) > MOST_FIELDS:
            raise RequestError("a part of the form has too many headers", code="invalid_form")

    def _check_header(self, content: bytearray) -> None:
        if len(content) > MOST_HEADER:
            raise RequestError("a header of the form is too long", code="invalid_form")

    def _open(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name or len(name) > MOST_NAME:
            raise RequestError("a part of the form has no name", code="invalid_form")
        if name in self.fields or (name == "file" and self.filename is not None):
            raise RequestError(f"'{name}' is there twice", param=name)
        self._name, self._is_file = name, name == "file"
        if self._is_file:
            given = options.get(b"filename", b"").decode("utf-8", "replace")
            # A name and nothing else: no folders, nothing that a terminal or a header would act on.
            last = given.replace("\\", "/").rpartition("/")[2]
            self.filename = "".join(letter for letter in last if letter.isprintable())[:MOST_NAME] or "file"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MOST_VALUE:
            raise RequestError(f"'{self._name}' is too long", param=self._name)

    def _end(self) -> None:
        if not self._is_file:
            value = self._value.decode("utf-8", "replace")
            if self._name in self._several:
                self.lists.setdefault(self._name, []).append(value)
            else:
                self.fields[self._name] = value

    def _finish(self) -> None:
        self._ended = True


async def together(stream: AsyncIterator[bytes], size: int = TOGETHER) -> AsyncIterator[bytes]:
    """The same bytes in larger pieces."""
    gathered = bytearray()
    async for piece in stream:
        gathered += piece
        if len(gathered) >= size:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)
