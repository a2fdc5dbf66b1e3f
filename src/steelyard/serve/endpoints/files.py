"""`/v1/files`: uploads that stream to disk, encrypted; lists, contents, deletion."""

from __future__ import annotations

import asyncio
from functools import partial
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from steelyard.errors import RequestError
from steelyard.serve import files
from steelyard.serve.endpoint import Form
from steelyard.serve.files import MOST_BYTES, UPLOADED
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.files import FileDeleted, FileObject
from steelyard.serve.protocol.lists import allow, paged, read_page, wanted
from steelyard.serve.protocol.parameters import TEXT, Parameter, integer_from, one_of
from steelyard.serve.protocol.uploads import Upload, together
from steelyard.serve.service import Service
from steelyard.store import tables

CONTENT = "application/octet-stream"
MOST_LISTED = 10_000
LEAST_EXPIRY, MOST_EXPIRY = 3600, 2_592_000
FORM = Form(
    {
        "type": "object",
        "properties": {
            "file": {"type": "string", "contentMediaType": CONTENT},
            "purpose": one_of(*UPLOADED),
            "expires_after[anchor]": one_of("created_at"),
            "expires_after[seconds]": integer_from(LEAST_EXPIRY, MOST_EXPIRY),
        },
        "required": ["file", "purpose"],
        "additionalProperties": False,
    }
)
FIELDS = FORM.schema["properties"].keys() - {"file"}
LISTED = (*paged(MOST_LISTED), Parameter("purpose", TEXT))


async def create(service: Service, request: Request) -> Response:
    """Take a file in; what its purpose demands of it is checked before it is listed."""
    project = request.state.caller.project
    await asyncio.to_thread(service.files.check_room, project, int(request.headers.get("content-length", "0")))
    opening = service.files.artifacts.writing(project)
    writer = await asyncio.to_thread(opening.__enter__)
    try:
        upload = Upload(request.headers.get("content-type", ""), writer.write)
        async for piece in together(request.stream()):
            await asyncio.to_thread(upload.feed, piece)
            if writer.size > MOST_BYTES:
                raise RequestError(f"a file of over {MOST_BYTES >> 20} MB: split it", param="file")
        upload.close()
        purpose, expires = _fields(upload.fields)
        if writer.size == 0:
            raise RequestError("the file is empty", param="file")
    except BaseException as error:
        await asyncio.to_thread(opening.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(opening.__exit__, None, None, None)
    now = service.now()
    row = await asyncio.to_thread(
        service.files.add,
        project,
        upload.filename or "file",
        purpose,
        writer.stored,
        now,
        None if expires is None else now + expires,
    )
    return json_response(FileObject.of(row))


async def list_files(service: Service, request: Request) -> Response:
    """The project's files."""
    asked = wanted(request, "purpose", most=MOST_LISTED)
    rules = [tables.files.c.project_id == request.state.caller.project]
    if "purpose" in request.query_params:
        rules.append(tables.files.c.purpose == request.query_params["purpose"])
    page = await service.database.read(
        lambda connection: read_page(connection, tables.files, rules, asked, FileObject.of)
    )
    return json_response(page)


async def retrieve(service: Service, request: Request) -> Response:
    """One file."""
    allow(request)
    find = partial(files.get, project=request.state.caller.project, file_id=request.path_params["file_id"])
    return json_response(FileObject.of(await service.database.read(find)))


async def content(service: Service, request: Request) -> Response:
    """What a file holds."""
    allow(request)
    project = request.state.caller.project
    row = await service.database.read(partial(files.get, project=project, file_id=request.path_params["file_id"]))
    pieces = service.files.artifacts.read(project, row["artifact"])
    first = await asyncio.to_thread(next, pieces, b"")  # so that what is wrong is said before anything is sent

    def all_pieces() -> object:
        yield first
        yield from pieces

    headers = {
        "content-length": str(row["bytes"]),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(row['filename'])}",
    }
    return StreamingResponse(all_pieces(), media_type=CONTENT, headers=headers)  # type: ignore[arg-type]


async def delete(service: Service, request: Request) -> Response:
    """Remove a file."""
    allow(request)
    file_id = request.path_params["file_id"]
    await asyncio.to_thread(service.files.delete, request.state.caller.project, file_id)
    return json_response(FileDeleted(file_id))


def _fields(fields: dict[str, str]) -> tuple[files.Purpose, int | None]:
    for name in fields.keys() - FIELDS:
        raise RequestError(f"unknown field '{name}': remove it", param=name, code="unknown_parameter")
    purpose = next((known for known in UPLOADED if known == fields.get("purpose")), None)
    if purpose is None:
        raise RequestError(f"'purpose' must be one of {', '.join(UPLOADED)}", param="purpose")
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise RequestError("'expires_after[anchor]' must be created_at", param="expires_after[anchor]")
    seconds = fields.get("expires_after[seconds]")
    if seconds is None:
        return purpose, None
    if not (seconds.isascii() and seconds.isdigit() and LEAST_EXPIRY <= int(seconds[:12]) <= MOST_EXPIRY):
        raise RequestError(
            f"'expires_after[seconds]' must be {LEAST_EXPIRY} to {MOST_EXPIRY}", param="expires_after[seconds]"
        )
    return purpose, int(seconds)
