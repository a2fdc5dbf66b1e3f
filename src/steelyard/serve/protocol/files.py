"""The shapes of files."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    object: Literal["file"] = "file"

    @classmethod
    def of(cls, row: dict[str, Any]) -> FileObject:
        """Of a row of the table."""
        return cls(**{name: row[name] for name in ("id", "bytes", "created_at", "filename", "purpose", "expires_at")})


class FileDeleted(msgspec.Struct, frozen=True):
    """A file is gone."""

    id: str
    deleted: bool = True
    object: Literal["file"] = "file"
