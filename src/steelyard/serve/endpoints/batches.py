"""`/v1/batches`: files of requests, answered within a day at half the price."""

from __future__ import annotations

from functools import partial

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import NotFoundError, RequestError
from steelyard.serve import files
from steelyard.serve.auth import Caller
from steelyard.serve.batches import records
from steelyard.serve.protocol.batches import Batch, BatchRequest
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.lists import allow, read_page, wanted
from steelyard.serve.service import Service
from steelyard.store import tables


async def create(service: Service, request: Request) -> Response:
    """A new batch: its file is checked, then its lines run where others leave room."""
    body = parse(BatchRequest, await request.body())
    caller: Caller = request.state.caller
    row = records.new_row(
        caller.project, caller.key_id, body.endpoint, body.input_file_id, body.metadata, service.now()
    )

    def make(connection: Connection) -> records.Row:
        try:
            file = files.get(connection, caller.project, body.input_file_id)
        except NotFoundError as error:
            raise RequestError(str(error), param="input_file_id", code="invalid_file") from None
        if file["purpose"] != "batch":
            raise RequestError(
                f"the file '{file['id']}' has the purpose '{file['purpose']}': upload it as batch",
                param="input_file_id",
            )
        return records.create(connection, row)

    made = await service.database.write(make)
    service.batches.wake()
    return json_response(Batch.of(made))


async def list_batches(service: Service, request: Request) -> Response:
    """The project's batches."""
    asked = wanted(request)
    rules = [tables.batches.c.project_id == request.state.caller.project]
    page = await service.database.read(lambda connection: read_page(connection, tables.batches, rules, asked, Batch.of))
    return json_response(page)


async def retrieve(service: Service, request: Request) -> Response:
    """One batch."""
    allow(request)
    find = partial(records.get, project=request.state.caller.project, batch_id=request.path_params["batch_id"])
    return json_response(Batch.of(await service.database.read(find)))


async def cancel(service: Service, request: Request) -> Response:
    """Begin no line any more."""
    allow(request)
    project, batch, now = request.state.caller.project, request.path_params["batch_id"], service.now()
    row = await service.database.write(lambda connection: records.cancel(connection, project, batch, now))
    service.batches.wake()
    return json_response(Batch.of(row))
