"""Responses that are kept (all but those with `store: false`): sealed, read again, gone on from, forgotten in time."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, insert, select

from steelyard.errors import RequestError
from steelyard.serve.limits import MAX_BODY_BYTES
from steelyard.serve.owned import find
from steelyard.store import tables
from steelyard.store.artifacts import Artifacts
from steelyard.store.database import Database

KEPT_SECONDS = 30 * 86400
MOST_BEFORE = 1000
"""Responses that one may go on from, in all,"""
MOST_BYTES = MAX_BODY_BYTES
"""and what they hold: as much as a request might that sends all of it."""

Row = dict[str, Any]
columns = tables.responses.c


class Kept(msgspec.Struct, frozen=True):
    """What is kept of a response."""

    input: list[dict[str, Any]]
    """Items of the request, without those of responses before."""
    answer: Any
    """The whole response object."""


class StoredResponses:
    """The kept responses of all projects.

    Args:
        database: has their table.
        artifacts: seals.
    """

    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self._database, self._artifacts = database, artifacts

    async def keep(self, project: str, kept: Kept) -> None:
        """Keep one; it has the id of its answer."""
        answer = kept.answer
        sealed = await asyncio.to_thread(self._artifacts.seal, project, msgspec.json.encode(kept))
        row = {
            "id": answer["id"],
            "project_id": project,
            "previous": answer["previous_response_id"],
            "created_at": answer["created_at"],
            "content": sealed,
        }
        await self._database.write(lambda connection: connection.execute(insert(tables.responses), row))

    async def read(self, project: str, response: str) -> Kept:
        """A project's response. Raises NotFoundError: it has kept none of this id."""
        row = await self._database.read(lambda connection: get(connection, project, response))
        return await asyncio.to_thread(self._opened, row)

    async def remove(self, project: str, response: str) -> None:
        """Forget one. Raises NotFoundError: there is none."""

        def forget(connection: Connection) -> None:
            get(connection, project, response)
            connection.execute(delete(tables.responses).where(columns.id == response))

        await self._database.write(forget)

    async def history(self, project: str, response: str | None) -> list[dict[str, Any]]:
        """Every item up to the end of a response: what it was asked, what it answered, and of those before it.

        Raises:
            RequestError: one of them is not there any more, or was never the project's, or they are too many.
        """
        if response is None:
            return []
        rows = await self._database.read(lambda connection: _chain(connection, project, response))
        kept = await asyncio.to_thread(lambda: [self._opened(row) for row in rows])
        return [item for one in kept for item in (*one.input, *one.answer["output"])]

    def _opened(self, row: Row) -> Kept:
        content = self._artifacts.unseal(row["project_id"], row["content"])
        return msgspec.json.decode(content, type=Kept)


def get(connection: Connection, project: str, response: str) -> Row:
    """A project's response.

    Raises:
        NotFoundError: it has kept none of this id.
    """
    return find(connection, tables.responses, project, response, "response", param="response_id")


def expire(connection: Connection, now: int) -> None:
    """Forget responses that are old."""
    connection.execute(delete(tables.responses).where(columns.created_at <= now - KEPT_SECONDS))


def _chain(connection: Connection, project: str, response: str) -> list[Row]:
    """A response and those before it, the oldest first."""
    found: list[Row] = []
    held = 0
    wanted: str | None = response
    while wanted is not None:
        mine = (columns.id == wanted, columns.project_id == project)
        row = connection.execute(select(tables.responses).where(*mine)).mappings().first()
        if row is None:
            what = "" if wanted == response else f", which '{response}' goes on from,"
            raise RequestError(
                f"the response '{wanted}'{what} is not in this project: send the conversation as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        held += len(row["content"])
        if len(found) == MOST_BEFORE or held > MOST_BYTES:
            raise RequestError(
                f"'{response}' goes on from more than {MOST_BEFORE} responses or {MOST_BYTES} bytes: begin anew, with"
                " what matters of them",
                param="previous_response_id",
            )
        found.append(dict(row))
        wanted = row["previous"]
    return found[::-1]
