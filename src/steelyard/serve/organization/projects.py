"""Projects and their service accounts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from steelyard.errors import ConflictError, NotFoundError, RequestError
from steelyard.serve.auth import PROJECT_SCOPES
from steelyard.serve.ids import fresh
from steelyard.serve.organization.audit import Actor
from steelyard.serve.organization.keys import NewKey, create_key
from steelyard.serve.owned import find
from steelyard.store import tables

MOST_NAME = 256
FIRST_PROJECT = "default"

Row = dict[str, Any]


def check_name(name: str) -> str:
    """A name as it is kept.

    Raises:
        RequestError: it is empty, too long or not printable.
    """
    name = name.strip()
    if not 0 < len(name) <= MOST_NAME or not name.isprintable():
        raise RequestError(f"'name' must be 1 to {MOST_NAME} printable characters", param="name")
    return name


def create(connection: Connection, actor: Actor, name: str) -> Row:
    """A new project."""
    row: Row = {
        "id": fresh("proj_"),
        "name": check_name(name),
        "created_at": actor.now,
        "archived_at": None,
        "monthly_limit": None,
    }
    connection.execute(insert(tables.projects), row)
    actor.log(connection, "project.created", row["id"], row["id"], name=row["name"])
    return row


def get(connection: Connection, project_id: str) -> Row:
    """A project.

    Raises:
        NotFoundError: there is none.
    """
    row = connection.execute(select(tables.projects).where(tables.projects.c.id == project_id)).mappings().first()
    if row is None:
        raise NotFoundError(f"no project '{project_id[:80]}'", param="project_id")
    return dict(row)


def active(connection: Connection, project_id: str) -> Row:
    """A project that is not archived.

    Raises:
        NotFoundError: there is none.
        ConflictError: it is archived.
    """
    row = get(connection, project_id)
    if row["archived_at"] is not None:
        raise ConflictError(f"the project '{project_id}' is archived", param="project_id", code="project_archived")
    return row


def everyone(connection: Connection) -> list[Row]:
    """Every project, the oldest first."""
    columns = tables.projects.c
    rows = connection.execute(select(tables.projects).order_by(columns.created_at, columns.id))
    return [dict(row) for row in rows.mappings()]


def first(connection: Connection) -> Row | None:
    """The oldest project that is not archived."""
    columns = tables.projects.c
    row = (
        connection.execute(
            select(tables.projects).where(columns.archived_at.is_(None)).order_by(columns.created_at, columns.id)
        )
        .mappings()
        .first()
    )
    return None if row is None else dict(row)


def rename(connection: Connection, actor: Actor, project_id: str, name: str) -> Row:
    """Give a project another name."""
    row = active(connection, project_id)
    row["name"] = check_name(name)
    connection.execute(update(tables.projects).where(tables.projects.c.id == project_id).values(name=row["name"]))
    actor.log(connection, "project.updated", project_id, project_id, name=row["name"])
    return row


def archive(connection: Connection, actor: Actor, project_id: str) -> Row:
    """Close a project for good: its keys stop working, its records stay."""
    row = active(connection, project_id)
    row["archived_at"] = actor.now
    connection.execute(update(tables.projects).where(tables.projects.c.id == project_id).values(archived_at=actor.now))
    actor.log(connection, "project.archived", project_id, project_id)
    return row


def create_service_account(
    connection: Connection, actor: Actor, pepper: bytes, project_id: str, name: str, *, with_key: bool = True
) -> tuple[Row, NewKey | None]:
    """A service account of a project, and its key, which is shown this once."""
    active(connection, project_id)
    row: Row = {
        "id": fresh("svc_acct_"),
        "project_id": project_id,
        "name": check_name(name),
        "role": "member",
        "created_at": actor.now,
    }
    connection.execute(insert(tables.service_accounts), row)
    actor.log(connection, "service_account.created", row["id"], project_id, name=row["name"])
    if not with_key:
        return row, None
    key = create_key(
        connection, actor, pepper, "Secret Key", PROJECT_SCOPES, project_id=project_id, service_account_id=row["id"]
    )
    return row, key


def service_account(connection: Connection, project_id: str, account_id: str) -> Row:
    """A project's service account.

    Raises:
        NotFoundError: it has none of this id.
    """
    return find(
        connection, tables.service_accounts, project_id, account_id, "service account", param="service_account_id"
    )


def delete_service_account(connection: Connection, actor: Actor, project_id: str, account_id: str) -> None:
    """Remove a service account; its keys stop working."""
    service_account(connection, project_id, account_id)
    connection.execute(delete(tables.api_keys).where(tables.api_keys.c.service_account_id == account_id))
    connection.execute(delete(tables.service_accounts).where(tables.service_accounts.c.id == account_id))
    actor.log(connection, "service_account.deleted", account_id, project_id)
