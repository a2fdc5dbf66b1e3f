"""`/v1/organization/admin_api_keys`: the keys of administrators, who have no project."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import ConflictError
from steelyard.serve.auth import ADMIN_SCOPES
from steelyard.serve.organization import keys
from steelyard.serve.protocol.errors import json_response, once
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.lists import allow, read_page, wanted
from steelyard.serve.protocol.organization import AdminKey, Deleted, KeyRequest
from steelyard.serve.service import Service
from steelyard.store import tables


async def create(service: Service, request: Request) -> Response:
    """A new key; its value is shown this once."""
    body = parse(KeyRequest, await request.body())
    actor = service.actor(request)
    expires = None if body.expires_in_seconds is None else service.now() + body.expires_in_seconds
    scopes = ADMIN_SCOPES if body.scopes is None else body.scopes
    key = await service.change(
        lambda connection: keys.create_key(
            connection, actor, service.secrets.pepper, body.name, scopes, project_id=None, expires_at=expires
        )
    )
    return once(request, AdminKey.of(key.row, key.value), AdminKey.of(key.row))


async def list_keys(service: Service, request: Request) -> Response:
    """Every admin key, without its value."""
    asked = wanted(request)
    rules = [tables.api_keys.c.project_id.is_(None)]
    page = await service.database.read(
        lambda connection: read_page(connection, tables.api_keys, rules, asked, AdminKey.of)
    )
    return json_response(page)


async def retrieve(service: Service, request: Request) -> Response:
    """One key, without its value."""
    allow(request)
    key = request.path_params["key_id"]
    row = await service.database.read(lambda connection: keys.get_key(connection, key, None))
    return json_response(AdminKey.of(row))


async def delete(service: Service, request: Request) -> Response:
    """Take a key back, unless it is the one that asks."""
    actor, key = service.actor(request), request.path_params["key_id"]
    if actor.id == key:
        raise ConflictError("an admin key does not take itself back: use another", param="key_id")
    await service.change(lambda connection: keys.delete_key(connection, actor, key, None))
    return json_response(Deleted(key, "organization.admin_api_key.deleted"))
