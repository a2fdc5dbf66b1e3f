"""`/v1/organization/model_aliases` and the days models end: what names stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import RequestError
from steelyard.serve import aliases
from steelyard.serve.models import ADAPTER_NAME
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import Fields, parse
from steelyard.serve.protocol.lists import Page, allow, page_of
from steelyard.serve.service import Service


class AliasRequest(Fields):
    """Let a name stand for a model."""

    name: str
    model: str


class CanaryRequest(Fields):
    """Give a share of those who ask another model."""

    model: str | None
    percentage: Annotated[int, Field(ge=0, le=100)] = 0


class ShutdownRequest(Fields):
    """When a model ends, in Unix seconds; null: not."""

    shutdown_date: Annotated[int, Field(ge=0, lt=1 << 40)] | None


class Alias(msgspec.Struct, frozen=True):
    """What a name stands for."""

    id: str
    model: str
    canary: str | None
    canary_percentage: int
    history: list[str]
    created_at: int
    object: Literal["organization.model_alias"] = "organization.model_alias"

    @classmethod
    def of(cls, row: dict[str, Any]) -> Alias:
        """Of a row of the table."""
        return cls(row["name"], row["model"], row["canary"], row["percent"], row["history"], row["created_at"])


class AliasDeleted(msgspec.Struct, frozen=True):
    """A name stands for nothing any more."""

    id: str
    deleted: bool = True
    object: Literal["organization.model_alias.deleted"] = "organization.model_alias.deleted"


class Shutdown(msgspec.Struct, frozen=True):
    """When a model ends."""

    id: str
    shutdown_date: int | None
    object: Literal["organization.model_shutdown"] = "organization.model_shutdown"


async def put(service: Service, request: Request) -> Response:
    """A new name, or another model for one."""
    body = parse(AliasRequest, await request.body())
    if not ADAPTER_NAME.fullmatch(body.name) or body.name in service.models:
        raise RequestError("'name' must be of letters, digits and . _ : / -, and no model's own", param="name")
    _demand_served(service, body.model)
    actor = service.actor(request)
    return await _changed(service, lambda connection: aliases.point(connection, actor, body.name, body.model))


async def list_aliases(service: Service, request: Request) -> Response:
    """Every name."""
    allow(request)
    found = [Alias.of(row) for _, row in sorted(service.names.aliases.items())]
    page: Page[Alias] = page_of(found, [alias.id for alias in found], max(1, len(found)))
    return json_response(page)


async def retrieve(service: Service, request: Request) -> Response:
    """One name."""
    allow(request)
    name = request.path_params["alias"]
    return json_response(Alias.of(await service.database.read(lambda connection: aliases.get(connection, name))))


async def delete(service: Service, request: Request) -> Response:
    """Let a name stand for nothing."""
    actor, name = service.actor(request), request.path_params["alias"]
    await service.change(lambda connection: aliases.remove(connection, actor, name))
    return json_response(AliasDeleted(name))


async def canary(service: Service, request: Request) -> Response:
    """Try a model out on a share of those who ask."""
    body = parse(CanaryRequest, await request.body())
    if body.model is not None:
        _demand_served(service, body.model)
    actor, name = service.actor(request), request.path_params["alias"]
    return await _changed(
        service, lambda connection: aliases.try_out(connection, actor, name, body.model, body.percentage)
    )


async def promote(service: Service, request: Request) -> Response:
    """Give everybody the model that is tried out, if its certificate allows it."""
    actor, name = service.actor(request), request.path_params["alias"]
    return await _changed(service, lambda connection: aliases.promote(connection, actor, name, service.models))


async def roll_back(service: Service, request: Request) -> Response:
    """Go back to what a name stood for before."""
    actor, name = service.actor(request), request.path_params["alias"]
    return await _changed(service, lambda connection: aliases.roll_back(connection, actor, name))


async def shut_down(service: Service, request: Request) -> Response:
    """Say when a model ends."""
    body = parse(ShutdownRequest, await request.body())
    actor, model = service.actor(request), request.path_params["model_id"]
    _demand_served(service, model)
    await service.change(lambda connection: aliases.shut_down(connection, actor, model, body.shutdown_date))
    return json_response(Shutdown(model, body.shutdown_date))


async def _changed(service: Service, operation: Callable[[Connection], dict[str, Any]]) -> Response:
    return json_response(Alias.of(await service.change(operation)))


def _demand_served(service: Service, model: str) -> None:
    served = service.models.get(model)
    if served is None or served.project is not None:
        raise RequestError(f"'{model[:80]}' is no model that is served to everybody here", param="model")
