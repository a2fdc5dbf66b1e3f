"""`GET /v1/organization/audit_logs`: who changed what."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, select
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import NotFoundError
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.lists import Page, allow, integer, page_of
from steelyard.serve.service import Service
from steelyard.store import tables


class ActorKey(msgspec.Struct, frozen=True):
    """The key that was used."""

    id: str
    type: Literal["user", "service_account"] = "user"


class Actor(msgspec.Struct, frozen=True):
    """Who it was."""

    api_key: ActorKey
    type: Literal["api_key"] = "api_key"


class AuditedProject(msgspec.Struct, frozen=True):
    """Whose."""

    id: str


class AuditLog(msgspec.Struct, frozen=True, kw_only=True):
    """A change."""

    id: str
    effective_at: int
    type: str
    actor: Actor
    project: AuditedProject | None
    target: str
    detail: Any
    mac: str
    """Of the entry in the chain."""

    @classmethod
    def of(cls, row: dict[str, Any]) -> AuditLog:
        """Of a row of the table."""
        return cls(
            id=_id(row["sequence"]),
            effective_at=row["at"],
            type=row["event"],
            actor=Actor(ActorKey(row["actor"])),
            project=None if row["project_id"] is None else AuditedProject(row["project_id"]),
            target=row["target"],
            detail=row["detail"],
            mac=row["mac"].hex(),
        )


async def list_logs(service: Service, request: Request) -> Response:
    """Changes, newest first."""
    given = allow(request, "limit", "after")
    limit = integer(given, "limit", 1, 100, 20)
    after = given.get("after", "").removeprefix("audit_log-")
    if "after" in given and not (after.isascii() and after.isdigit() and len(after) < 19):
        raise NotFoundError("'after' names nothing of this list", param="after")
    columns = tables.audit.c

    def read(connection: Connection) -> Page[AuditLog]:
        rules = [columns.sequence < int(after)] if after else []
        rows = connection.execute(
            select(tables.audit).where(*rules).order_by(columns.sequence.desc()).limit(limit + 1)
        ).mappings()
        found = [dict(row) for row in rows]
        return page_of([AuditLog.of(row) for row in found[:limit]], [_id(row["sequence"]) for row in found], limit)

    return json_response(await service.database.read(read))


def _id(sequence: int) -> str:
    return f"audit_log-{sequence}"
