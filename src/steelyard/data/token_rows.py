"""Token rows in flat arrays: in memory, or in mapped files where they are more than memory should hold."""

# T tokens of all rows  R rows

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from steelyard.atomic import folder_aside
from steelyard.data.rows import TokenRow

FILES = ("tokens.u32", "trained.u8", "lengths.u32", "targets.u32")
KEY = "key"
"""File that says what the others were made from."""


class TokenRows:
    """Rows by number, as many as the arrays have; a row's list is made when it is asked for.

    Args:
        tokens: `[T]` uint32.
        trained: `[T]` uint8: whether the loss counts a token.
        lengths: `[R]` uint32.
        targets: `[R]` uint32: how many tokens of a row the loss counts.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.uint32],
        trained: npt.NDArray[np.uint8],
        lengths: npt.NDArray[np.uint32],
        targets: npt.NDArray[np.uint32],
    ) -> None:
        self._tokens, self._trained = tokens, trained
        self.lengths, self.targets = lengths, targets
        self._ends = np.cumsum(lengths, dtype=np.int64)

    @classmethod
    def of(cls, rows: Iterable[TokenRow]) -> TokenRows:
        """In memory, five bytes a token."""
        buffers = [io.BytesIO() for _ in FILES]
        _write(rows, buffers)
        tokens, trained, lengths, targets = (buffer.getbuffer() for buffer in buffers)
        return cls(
            np.frombuffer(tokens, np.uint32),
            np.frombuffer(trained, np.uint8),
            np.frombuffer(lengths, np.uint32),
            np.frombuffer(targets, np.uint32),
        )

    @classmethod
    def mapped(cls, folder: Path, key: str, rows: Iterable[TokenRow]) -> TokenRows:
        """In a folder's files. Those that are there by the same `key` are taken as they are; else `rows` are written.

        Raises:
            OSError: they cannot be written; nothing is left behind.
        """
        if not _is_whole(folder, key):
            with folder_aside(folder) as aside, _opened(aside) as files:
                _write(rows, files)
                (aside / KEY).write_text(key)
        tokens, trained, lengths, targets = (folder / name for name in FILES)
        return cls(_map(tokens, np.uint32), _map(trained, np.uint8), _map(lengths, np.uint32), _map(targets, np.uint32))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> TokenRow:
        end = int(self._ends[row])
        span = slice(end - int(self.lengths[row]), end)
        return TokenRow(tokens=self._tokens[span].tolist(), trained=self._trained[span].astype(bool).tolist())

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[row] for row in range(len(self)))

    def counts(self) -> dict[str, int]:
        """Rows, tokens, trained tokens, and the longest row."""
        return {
            "rows": len(self),
            "tokens": len(self._tokens),
            "trained_tokens": int(self.targets.sum(dtype=np.int64)),
            "longest_row": int(self.lengths.max(initial=0)),
        }


def _write(rows: Iterable[TokenRow], files: Iterable[BinaryIO]) -> None:
    tokens, trained, lengths, targets = files
    for row in rows:
        tokens.write(np.array(row.tokens, np.uint32).tobytes())
        trained.write(bytes(row.trained))
        lengths.write(len(row.tokens).to_bytes(4, "little"))
        targets.write(row.targets.to_bytes(4, "little"))


@contextmanager
def _opened(folder: Path) -> Iterator[list[BinaryIO]]:
    files: list[BinaryIO] = [(folder / name).open("wb") for name in FILES]
    try:
        yield files
    finally:
        for file in files:
            file.close()


def _is_whole(folder: Path, key: str) -> bool:
    try:
        return (folder / KEY).read_text() == key
    except OSError:
        return False


def _map(path: Path, kind: type[Any]) -> npt.NDArray[Any]:
    """A file as an array; an empty one cannot be mapped."""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
