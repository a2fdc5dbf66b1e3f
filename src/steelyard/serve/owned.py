"""What belongs to a project is found by its id and its project together: another one's is not there."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, select

from steelyard.errors import NotFoundError

Row = dict[str, Any]


def find(
    connection: Connection,
    table: Table,
    project: str | None,
    identity: str,
    what: str,
    *,
    param: str,
    code: str | None = None,
) -> Row:
    """A project's row.

    Args:
        connection: to read from.
        table: with the columns `id` and `project_id`.
        project: whose it has to be; None: nobody's, the organization's own.
        identity: its id.
        what: it is, for the message.
        param: the field that the id came from.
        code: of the error.

    Raises:
        NotFoundError: there is none of this id, or it is another's.
    """
    owner = table.c.project_id.is_(None) if project is None else table.c.project_id == project
    row = connection.execute(select(table).where(table.c.id == identity, owner)).mappings().first()
    if row is None:
        where = "" if project is None else " in this project"
        raise NotFoundError(f"no {what} '{identity[:80]}'{where}", param=param, code=code)
    return dict(row)
