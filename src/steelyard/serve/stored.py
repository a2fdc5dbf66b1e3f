"""Chat completions that a project asked to keep (`store: true`): sealed, listed, deleted, made a training file of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, insert, select, update

from steelyard.errors import RequestError
from steelyard.serve.files import Files
from steelyard.serve.owned import find
from steelyard.store import tables

MOST_EXPORTED = 50_000

Row = dict[str, Any]
columns = tables.stored_completions.c


class Kept(msgspec.Struct, frozen=True):
    """What is kept of a completion."""

    messages: list[dict[str, str]]
    """Of the request."""
    answer: Any
    """The whole response object."""


class StoredCompletions:
    """The kept completions of all projects.

    Args:
        files: seals, and takes exports.
    """

    def __init__(self, files: Files) -> None:
        self._files, self._database = files, files.database

    async def keep(self, project: str, kept: Kept, metadata: dict[str, str] | None) -> None:
        """Keep one; it has the id of its answer."""
        answer = kept.answer
        row = {
            "id": answer["id"],
            "project_id": project,
            "model": answer["model"],
            "created_at": answer["created"],
            "metadata": metadata,
            "content": self._files.artifacts.seal(project, msgspec.json.encode(kept)),
        }
        await self._database.write(lambda connection: connection.execute(insert(tables.stored_completions), row))

    def opened(self, row: Row) -> Kept:
        """A row's content."""
        return msgspec.json.decode(self._files.artifacts.unseal(row["project_id"], row["content"]), type=Kept)

    def export(self, project: str, model: str | None, metadata: dict[str, str] | None, now: int) -> Row:
        """The first answer of each as the rows of a training file, the oldest first; returns the file.

        Raises:
            RequestError: there is none.
        """
        rules = [columns.project_id == project, *filters(model, metadata or {})]
        query = select(tables.stored_completions).where(*rules).order_by(columns.created_at, columns.id)

        def read(connection: Connection) -> Sequence[Row]:
            return [dict(row) for row in connection.execute(query.limit(MOST_EXPORTED)).mappings()]

        rows = self._database.read_now(read)
        if not rows:
            raise RequestError("no stored completion is like this: nothing to export", code="nothing_stored")
        stored = self._files.artifacts.put(project, self._lines(rows))
        return self._files.add(project, "stored_completions.jsonl", "fine-tune", stored, now)

    def _lines(self, rows: Sequence[Row]) -> Iterator[bytes]:
        for row in rows:
            kept = self.opened(row)
            answer = kept.answer["choices"][0]["message"]["content"]
            if answer.strip():
                turns = [*kept.messages, {"role": "assistant", "content": answer}]
                yield json.dumps({"messages": turns}, ensure_ascii=False).encode() + b"\n"


def filters(model: str | None, metadata: dict[str, str]) -> list[Any]:
    """Rules for a model and for pairs of metadata."""
    found: list[Any] = [] if model is None else [columns.model == model]
    return found + [columns.metadata[key].as_string() == value for key, value in metadata.items()]


def get(connection: Connection, project: str, completion: str) -> Row:
    """A project's completion.

    Raises:
        NotFoundError: it has kept none of this id.
    """
    return find(connection, tables.stored_completions, project, completion, "stored completion", param="completion_id")


def change(connection: Connection, project: str, completion: str, metadata: dict[str, str] | None) -> Row:
    """Give one other metadata."""
    row = get(connection, project, completion)
    connection.execute(update(tables.stored_completions).where(columns.id == completion).values(metadata=metadata))
    return {**row, "metadata": metadata}


def remove(connection: Connection, project: str, completion: str) -> None:
    """Forget one."""
    get(connection, project, completion)
    connection.execute(delete(tables.stored_completions).where(columns.id == completion))
