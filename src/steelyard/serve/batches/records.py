"""Batches as rows, and what their input files must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, insert, select, update

from steelyard.data.readers import json_rows
from steelyard.errors import ConflictError, DataError
from steelyard.serve.ids import fresh
from steelyard.serve.owned import find
from steelyard.store import tables

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
WINDOW_SECONDS = 86400
MOST_LINES = 50_000
MOST_CUSTOM_ID = 512
MOST_ERRORS = 20

Row = dict[str, Any]
columns = tables.batches.c


class Line(msgspec.Struct, frozen=True):
    """A request of a batch."""

    number: int
    """From 1 on, as the file counts."""
    custom_id: str
    body: Row


def create(connection: Connection, row: Row) -> Row:
    """A new batch."""
    connection.execute(insert(tables.batches), row)
    return row


def new_row(project: str, key_id: str, endpoint: str, input_file: str, metadata: Row | None, now: int) -> Row:
    """What a new batch is."""
    return {
        "id": fresh("batch_"),
        "project_id": project,
        "key_id": key_id,
        "endpoint": endpoint,
        "input_file_id": input_file,
        "status": "validating",
        "errors": [],
        "output_file_id": None,
        "error_file_id": None,
        "model": None,
        "total": 0,
        "completed": 0,
        "failed": 0,
        "metadata": metadata,
        "moments": {},
        "created_at": now,
        "expires_at": now + WINDOW_SECONDS,
        "holder": None,
    }


def get(connection: Connection, project: str, batch_id: str) -> Row:
    """A project's batch.

    Raises:
        NotFoundError: it has none of this id.
    """
    return find(connection, tables.batches, project, batch_id, "batch", param="batch_id")


def cancel(connection: Connection, project: str, batch_id: str, now: int) -> Row:
    """Begin no line any more; what runs is finished.

    Raises:
        NotFoundError: the project has no such batch.
        ConflictError: it is over.
    """
    row = get(connection, project, batch_id)
    if row["status"] not in ("validating", "in_progress", "cancelling"):
        raise ConflictError(f"this batch is {row['status']}: there is nothing to cancel", code="invalid_status")
    return move(connection, row, "cancelling", now)


def move(connection: Connection, row: Row, status: Status, now: int, **values: Any) -> Row:
    """Bring a batch to a status, and remember when."""
    changed = {"status": status, "moments": {**row["moments"], f"{status}_at": now}, **values}
    connection.execute(update(tables.batches).where(columns.id == row["id"]).values(**changed))
    return {**row, **changed}


def open_batches(connection: Connection) -> list[Row]:
    """Of each project the oldest batch that there is something to do for, the oldest first."""
    open_statuses = ("validating", "in_progress", "finalizing", "cancelling")
    rows = connection.execute(
        select(tables.batches).where(columns.status.in_(open_statuses)).order_by(columns.created_at, columns.id)
    )
    found: dict[str, Row] = {}
    for row in rows.mappings():
        found.setdefault(row["project_id"], dict(row))
    return list(found.values())


def claim(connection: Connection, row: Row, holder: int) -> bool:
    """Let a server have a batch that none works on, as it was read; returns whether it still was so."""
    before = columns.holder.is_(None) if row["holder"] is None else columns.holder == row["holder"]
    still = (columns.id == row["id"], columns.status == row["status"], before)
    result = connection.execute(update(tables.batches).where(*still).values(holder=holder))
    return result.rowcount == 1


def read_lines(path: Path, endpoint: str) -> tuple[list[Line], list[Row]]:
    """The requests of a file, and what is wrong with it, as OpenAI's batches say it."""
    lines: list[Line] = []
    errors: list[Row] = []
    seen: set[str] = set()

    def wrong(number: int | None, code: str, message: str, param: str | None = None) -> None:
        errors.append({"line": number, "code": code, "message": message, "param": param})

    try:
        for number, row in json_rows(path):
            if len(lines) >= MOST_LINES:
                wrong(number, "too_many_tasks", f"a batch has {MOST_LINES} lines at most")
                break
            for name in row.keys() - {"custom_id", "method", "url", "body"}:
                wrong(number, "unknown_field", f"unknown field '{name[:80]}'", name[:80])
            identity, body = row.get("custom_id"), row.get("body")
            if not isinstance(identity, str) or not 0 < len(identity) <= MOST_CUSTOM_ID:
                wrong(number, "invalid_custom_id", f"a string of 1 to {MOST_CUSTOM_ID} characters", "custom_id")
            elif identity in seen:
                wrong(number, "duplicate_custom_id", f"'{identity[:80]}' is there twice", "custom_id")
            elif row.get("method") != "POST":
                wrong(number, "invalid_method", "must be POST", "method")
            elif row.get("url") != endpoint:
                wrong(number, "mismatched_url", f"must be {endpoint}, the batch's endpoint", "url")
            elif not isinstance(body, dict):
                wrong(number, "invalid_body", "must be an object", "body")
            else:
                seen.add(identity)
                lines.append(Line(number, identity, body))
            if len(errors) >= MOST_ERRORS:
                break
    except DataError as error:
        wrong(error.line, "invalid_json_line", error.reason, error.field)
    if not lines and not errors:
        wrong(None, "empty_file", "the file has no lines")
    return lines, errors
