"""The outermost middleware: an id and a clock for every request, one line of log, and an answer to every error.

It logs the method, the path, the status and the time; never a header, a query or a body.
"""

from __future__ import annotations

import json
import logging
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steelyard.serve.protocol.errors import error_response, is_expected

MAX_CLIENT_ID = 512
CLIENT_LEFT = 499

log = logging.getLogger("steelyard.access")
faults = logging.getLogger("steelyard.serve")


class AccessLog:
    """ASGI middleware: adds `x-request-id` and `openai-processing-ms`, echoes `x-client-request-id`.

    What stands behind it may leave in the state `headers` for the response, and `at_end`: what is called when all is
    over, the last first.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; nothing escapes but what happens after a response has begun."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        request_id = f"req_{secrets.token_hex(16)}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        client_id = Headers(scope=scope).get("x-client-request-id", "")

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(state.get("headers", {}))
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(_milliseconds(began))
                if client_id and len(client_id) <= MAX_CLIENT_ID and client_id.isascii() and client_id.isprintable():
                    headers["x-client-request-id"] = client_id
            await send(message)

        try:
            await self.app(scope, receive, labelled)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception as error:
            if not is_expected(error):
                faults.exception("%s failed", request_id)
            if status:
                raise
            await error_response(error, request_id)(scope, receive, labelled)
        finally:
            for end in reversed(state.get("at_end", ())):
                end()
            path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
            took, caller = _milliseconds(began), state.get("caller")
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": path,
                "status": status,
                "milliseconds": took,
                "project": None if caller is None else caller.project_id,
                "key": None if caller is None else caller.key_id,
            }
            log.info("%s %s %d %d ms %s", scope["method"], path, status, took, request_id, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object a line: the moment, the level, who says it, what, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        values = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


def _milliseconds(began: float) -> int:
    return round((time.perf_counter() - began) * 1000)
