"""Files of projects: what they are for, what they must hold, where their content is. Knows no HTTP.

What has to be read by others than this process (a training run) or as a file (a check of its rows) lies clear in one
folder, `clear`, readable by this user alone: an operator may point it at a tmpfs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from sqlalchemy import Connection, delete, func, insert, select

from steelyard.data import chat, preference
from steelyard.data.chat import FormatConfig
from steelyard.data.readers import json_rows
from steelyard.errors import DataError, NotFoundError, RequestError
from steelyard.serve.ids import fresh
from steelyard.serve.owned import find
from steelyard.serve.references import unused
from steelyard.store import tables
from steelyard.store.artifacts import Artifacts, Stored
from steelyard.store.database import Database

Purpose = Literal["fine-tune", "batch", "user_data", "batch_output", "fine-tune-results"]
UPLOADED: tuple[Purpose, ...] = ("fine-tune", "batch", "user_data")
"""What a customer may upload; the others are made here."""
MOST_BYTES = 512 << 20
MOST_STORED = 20 << 30
"""Of a project, together."""

Row = dict[str, Any]
columns = tables.files.c


class Files:
    """The files of all projects.

    Args:
        database: where they are listed.
        artifacts: where their contents are.
        clear: the folder for what must lie clear for a while.
    """

    def __init__(self, database: Database, artifacts: Artifacts, clear: Path) -> None:
        self.database, self.artifacts, self._clear = database, artifacts, clear

    def check_room(self, project: str, size: int) -> None:
        """Refuse an upload that the project has no room for.

        Raises:
            RequestError: its files together would be too large.
        """
        held = self.database.read_now(
            lambda connection: connection.execute(
                select(func.coalesce(func.sum(columns.bytes), 0)).where(columns.project_id == project)
            ).scalar_one()
        )
        if held + size > MOST_STORED:
            raise RequestError(
                f"this project's files would take over {MOST_STORED >> 30} GB, its limit: delete some",
                param="file",
                code="storage_quota_exceeded",
            )

    def add(
        self, project: str, filename: str, purpose: Purpose, stored: Stored, now: int, expires_at: int | None = None
    ) -> Row:
        """List a file whose content is stored, once it holds what its purpose needs.

        Raises:
            DataError: a line is wrong; its number and the field are named. Nothing is kept.
        """
        try:
            if purpose == "fine-tune":
                with self.clear(project, stored.name, "upload.jsonl") as path:
                    check_rows(path, filename)
        except DataError:
            self._drop(project, stored.name)
            raise
        row: Row = {
            "id": fresh("file-"),
            "project_id": project,
            "filename": filename,
            "purpose": purpose,
            "bytes": stored.size,
            "sha256": stored.sha256,
            "artifact": stored.name,
            "created_at": now,
            "expires_at": expires_at,
        }
        self.database.write_now(lambda connection: connection.execute(insert(tables.files), row))
        return row

    def delete(self, project: str, file_id: str) -> None:
        """Remove a file, and its content where no other file has the same.

        Raises:
            NotFoundError: the project has no such file.
        """

        def remove(connection: Connection) -> str:
            row = get(connection, project, file_id)
            connection.execute(delete(tables.files).where(columns.id == file_id))
            name: str = row["artifact"]
            return name

        self._drop(project, self.database.write_now(remove))

    @contextlib.contextmanager
    def clear(self, project: str, artifact: str, name: str) -> Iterator[Path]:
        """A content as a file that only we can read, for as long as the block runs."""
        self._clear.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = Path(tempfile.mkdtemp(dir=self._clear))
        try:
            yield self.write_clear(project, artifact, folder / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write_clear(self, project: str, artifact: str, path: Path) -> Path:
        """Write a content to a file that only we can read."""
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            for piece in self.artifacts.read(project, artifact):
                file.write(piece)
        return path

    def write_clear_file(self, project: str, file_id: str, path: Path) -> Path:
        """Write a project's file to one that only we can read, whole or not at all.

        Raises:
            NotFoundError: the project has none of this id.
        """
        row = self.database.read_now(lambda connection: get(connection, project, file_id))
        return self.write_clear(project, row["artifact"], path.with_suffix(".part")).replace(path)

    def expire(self, now: int) -> int:
        """Remove what has expired; returns how many."""
        rows = self.database.read_now(
            lambda connection: connection.execute(
                select(columns.project_id, columns.id).where(columns.expires_at <= now)
            ).all()
        )
        for row in rows:
            with contextlib.suppress(NotFoundError):
                self.delete(row.project_id, row.id)
        return len(rows)

    def _drop(self, project: str, artifact: str) -> None:
        for name in self.database.read_now(lambda connection: unused(connection, project, {artifact})):
            self.artifacts.delete(project, name)


def get(connection: Connection, project: str, file_id: str) -> Row:
    """A project's file.

    Raises:
        NotFoundError: it has none of this id.
    """
    return find(connection, tables.files, project, file_id, "file", param="file_id", code="file_not_found")


def check_rows(path: Path, shown: str) -> int:
    """How many rows a training file has, of chats or of preferences.

    Raises:
        DataError: a line is wrong, under the name that its owner knows.
    """
    try:
        _, first = next(json_rows(path), (0, {}))
        if "preferred_output" in first:
            return len(preference.read(path))
        return len(chat.read(path, FormatConfig(format="chat")))
    except DataError as error:
        raise DataError(error.reason, file=shown, line=error.line, field=error.field) from None


assert set(UPLOADED) < set(get_args(Purpose))
