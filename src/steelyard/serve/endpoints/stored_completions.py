"""`/v1/chat/completions` that were kept: listed, read, renamed by metadata, deleted, exported as a training file."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import NotFoundError
from steelyard.serve import stored
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import Fields, Metadata, parse
from steelyard.serve.protocol.files import FileObject
from steelyard.serve.protocol.lists import Page, Wanted, allow, page_of, paged, read_page, wanted
from steelyard.serve.protocol.parameters import TEXT, Parameter
from steelyard.serve.service import Service
from steelyard.store import tables

METADATA = re.compile(r"metadata\[.+\]", re.DOTALL)
LISTED = (
    *paged(),
    Parameter("model", TEXT),
    Parameter(
        "metadata",
        {"type": "object", "propertyNames": {"minLength": 1}, "additionalProperties": TEXT},
        style="deepObject",
    ),
)


class ChangeRequest(Fields):
    """Other metadata."""

    metadata: Metadata | None


class ExportRequest(Fields):
    """Which to export; all of them without a word."""

    model: str | None = None
    metadata: Metadata | None = None


class CompletionDeleted(msgspec.Struct, frozen=True):
    """It is gone."""

    id: str
    deleted: bool = True
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"


async def list_completions(service: Service, request: Request) -> Response:
    """The project's, by `model` and `metadata[key]`."""
    keys = [name for name in request.query_params if METADATA.fullmatch(name)]
    asked = wanted(request, "model", *keys)
    given = request.query_params
    rules = [tables.stored_completions.c.project_id == request.state.caller.project]
    rules += stored.filters(given.get("model"), {key[9:-1]: given[key] for key in keys})

    def shape(row: dict[str, Any]) -> Any:
        return _shape(service, row)

    page = await service.database.read(
        lambda connection: read_page(connection, tables.stored_completions, rules, asked, shape)
    )
    return json_response(page)


async def retrieve(service: Service, request: Request) -> Response:
    """One."""
    allow(request)
    return json_response(_shape(service, await _find(service, request)))


async def change(service: Service, request: Request) -> Response:
    """Give one other metadata."""
    body = parse(ChangeRequest, await request.body())
    project, name = request.state.caller.project, request.path_params["completion_id"]
    row = await service.database.write(lambda connection: stored.change(connection, project, name, body.metadata))
    return json_response(_shape(service, row))


async def delete(service: Service, request: Request) -> Response:
    """Forget one."""
    allow(request)
    project, name = request.state.caller.project, request.path_params["completion_id"]
    await service.database.write(lambda connection: stored.remove(connection, project, name))
    return json_response(CompletionDeleted(name))


async def messages(service: Service, request: Request) -> Response:
    """What it answered to."""
    asked: Wanted = wanted(request)
    row = await _find(service, request)
    found: list[dict[str, Any]] = [
        {"id": f"{row['id']}-{number}", "refusal": None, **message}
        for number, message in enumerate(service.stored.opened(row).messages)
    ]
    if asked.order == "desc":
        found.reverse()
    ids = [one["id"] for one in found]
    if asked.after is not None and asked.after not in ids:
        raise NotFoundError("'after' names nothing of this list", param="after")
    begin = 0 if asked.after is None else ids.index(asked.after) + 1
    page: Page[Any] = page_of(found[begin : begin + asked.limit], ids[begin:], asked.limit)
    return json_response(page)


async def export(service: Service, request: Request) -> Response:
    """A training file of what was kept."""
    body = parse(ExportRequest, await request.body())
    project, now = request.state.caller.project, service.now()
    row = await asyncio.to_thread(service.stored.export, project, body.model, body.metadata, now)
    return json_response(FileObject.of(row))


async def _find(service: Service, request: Request) -> dict[str, Any]:
    project, name = request.state.caller.project, request.path_params["completion_id"]

    def read(connection: Connection) -> dict[str, Any]:
        return stored.get(connection, project, name)

    return await service.database.read(read)


def _shape(service: Service, row: dict[str, Any]) -> Any:
    return {**service.stored.opened(row).answer, "metadata": row["metadata"]}
