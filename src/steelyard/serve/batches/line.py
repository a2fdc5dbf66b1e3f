"""A line of a batch as a request: through the application's own routes, checked, run and paid like any other."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from starlette.types import ASGIApp, Message

from steelyard.errors import EngineUnavailableError, StorageError, edge
from steelyard.serve.auth import Caller
from steelyard.serve.batches.records import Line
from steelyard.serve.billing.bill import BatchLine
from steelyard.serve.protocol.errors import error_body, is_expected

Row = dict[str, Any]


async def answer_line(router: ASGIApp, batch: Row, line: Line, identity: str, paid: bool) -> tuple[int, str, Row]:
    """The status, the request's id and the body of a line's answer.

    Args:
        router: the application's routes, without what stands before them: the batch's owner was let in when he made it.
        batch: its row.
        line: which.
        identity: of this attempt's reservation.
        paid: whether it was settled before, its answer lost.

    Raises:
        EngineUnavailableError: its engine is not there: it is to be asked again.
        StorageError: likewise the database.
    """
    request_id = f"req_{secrets.token_hex(16)}"
    if line.body.get("stream"):
        return 400, request_id, _error("'stream' is not for batches: remove it", "stream")
    caller = Caller(batch["key_id"], batch["project_id"], frozenset({"inference"}))
    path = batch["endpoint"]
    scope: Row = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "state": {"caller": caller, "request_id": request_id, "line": BatchLine(identity, paid)},
    }
    content, given = json.dumps(line.body).encode(), False
    status, body = 500, bytearray()

    async def receive() -> Message:
        nonlocal given
        if given:
            await _never()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            body.extend(message.get("body", b""))

    try:
        await router(scope, receive, send)
    except (EngineUnavailableError, StorageError):
        raise
    except Exception as error:
        if not is_expected(error):
            raise
        told = error_body(error, request_id).error
        return edge(error).status, request_id, _error(told.message, told.param, told.type, told.code)
    found: Row = json.loads(bytes(body))
    return status, request_id, found


def _error(message: str, param: str | None, kind: str = "invalid_request_error", code: str | None = None) -> Row:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _never() -> None:
    """The client of a line does not leave."""
    await asyncio.Event().wait()
