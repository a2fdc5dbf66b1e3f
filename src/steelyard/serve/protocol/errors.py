"""Any error as OpenAI's error object, with the status and the headers that belong to it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import (
    EngineUnavailableError,
    PathNotFoundError,
    RateLimitError,
    SteelyardError,
    StorageError,
    edge,
)


class ErrorObject(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The whole body of an error response, and of an error event in a stream."""

    error: ErrorObject


def is_expected(error: BaseException) -> bool:
    """Whether the error is the client's to see; of any other only its id is."""
    unavailable = isinstance(error, EngineUnavailableError | StorageError)
    return unavailable or (isinstance(error, SteelyardError) and edge(error).status < 500)


def error_body(error: BaseException, request_id: str) -> ErrorBody:
    """The error object for `error`; of our own faults it tells the request id only."""
    kind = edge(error)
    if not is_expected(error):
        message = f"internal error: the server's log has its details under {request_id}"
        return ErrorBody(ErrorObject(message, "server_error", None, "internal_error"))
    code = getattr(error, "code", None) or kind.code
    return ErrorBody(ErrorObject(_one_line(str(error)), kind.type, getattr(error, "param", None), code))


def error_response(error: BaseException, request_id: str) -> Response:
    """The response for `error`."""
    headers: dict[str, str] = {}
    if isinstance(error, EngineUnavailableError | StorageError | RateLimitError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    status = edge(error).status
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if getattr(error, "code", None) == "request_timeout":
        headers["connection"] = "close"
    return json_response(error_body(error, request_id), status, headers)


async def refuse_path(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405 in our shape."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    if error.status_code == 405:
        message = f"{request.method} is not a method of {path}: use {(error.headers or {}).get('Allow', 'another')}"
        code = "method_not_allowed"
    elif error.status_code == 404:
        message, code = (
            f"there is no {path} here: GET /openapi.json lists what there is",
            edge(PathNotFoundError("")).code or "",
        )
    else:
        message, code = str(error.detail), "invalid_request"
    body = ErrorBody(ErrorObject(_one_line(message), "invalid_request_error", None, code))
    return json_response(body, error.status_code, dict(error.headers or {}))


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response of one of our structs, or of plain values."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def once(request: Request, body: msgspec.Struct, again: msgspec.Struct) -> Response:
    """A response with a secret: a replay of it (see `idempotency.py`) has the body `again`, without."""
    request.state.replay = msgspec.json.encode(again)
    return json_response(body)


def _one_line(text: str) -> str:
    """What clients wrote may be part of a message; it must not look like several."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
