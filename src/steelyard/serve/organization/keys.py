"""API keys as records: made, listed, taken back. A key itself is shown when it is made and never again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert

from steelyard.errors import RequestError
from steelyard.serve.auth import ADMIN_SCOPES, PROJECT_SCOPES
from steelyard.serve.ids import fresh
from steelyard.serve.keys import mac, new_key, redacted
from steelyard.serve.organization.audit import Actor
from steelyard.serve.owned import find
from steelyard.store import tables

MOST_NAME = 256

Row = dict[str, Any]


@dataclass(frozen=True, repr=False)
class NewKey:
    """A key that was just made."""

    row: Row
    value: str


def create_key(
    connection: Connection,
    actor: Actor,
    pepper: bytes,
    name: str,
    scopes: Sequence[str],
    *,
    project_id: str | None,
    service_account_id: str | None = None,
    expires_at: int | None = None,
) -> NewKey:
    """A new key of a project, or of administrators.

    Raises:
        RequestError: a name that is none, or a scope that such a key cannot have.
    """
    possible = ADMIN_SCOPES if project_id is None else PROJECT_SCOPES
    if not scopes or not set(scopes) <= set(possible):
        raise RequestError(f"'scopes' must be some of {', '.join(possible)}", param="scopes")
    if not 0 < len(name) <= MOST_NAME or not name.isprintable():
        raise RequestError(f"'name' must be 1 to {MOST_NAME} printable characters", param="name")
    value = new_key()
    row: Row = {
        "id": fresh("key_"),
        "project_id": project_id,
        "service_account_id": service_account_id,
        "name": name,
        "mac": mac(pepper, value),
        "redacted": redacted(value),
        "scopes": sorted(set(scopes)),
        "created_at": actor.now,
        "expires_at": expires_at,
        "last_used_at": None,
    }
    connection.execute(insert(tables.api_keys), row)
    actor.log(connection, "api_key.created", row["id"], project_id, name=name, scopes=row["scopes"])
    return NewKey(row, value)


def get_key(connection: Connection, key_id: str, project_id: str | None) -> Row:
    """A project's key, or an administrators' one.

    Raises:
        NotFoundError: there is none of this id.
    """
    return find(connection, tables.api_keys, project_id, key_id, "key", param="api_key_id")


def delete_key(connection: Connection, actor: Actor, key_id: str, project_id: str | None) -> None:
    """Take a key back."""
    get_key(connection, key_id, project_id)
    connection.execute(delete(tables.api_keys).where(tables.api_keys.c.id == key_id))
    actor.log(connection, "api_key.deleted", key_id, project_id)
