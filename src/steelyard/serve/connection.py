"""Work that is worth doing only while somebody waits for it, and answers that are sent as they come.

Knows ASGI and bytes; nothing of models. Starlette cancels only streams when a client leaves; `while_connected`
does so for every kind of answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from steelyard.serve.protocol.errors import error_body, is_expected

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"

log = logging.getLogger("steelyard.serve")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if the client leaves. The request's body must have been read.

    Raises:
        ClientDisconnect: the client left first.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def event(body: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def named_event(body: msgspec.Struct) -> bytes:
    """One server-sent event that also has its name, which is the body's tag."""
    return f"event: {body.__struct_config__.tag}\n".encode() + event(body)


class EventStream(Response):
    """Server-sent events, sent as they come.

    The response begins with the first event: an error before it is an ordinary error response, one after it is an
    error event, and no `[DONE]` follows it.

    Args:
        events: whole events; closed when the client leaves.
        request_id: named in what is said of our own faults.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], request_id: str) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events, self.request_id = events, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events.

        Raises:
            Exception: whatever happened before the first one.
        """
        await while_connected(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        started = False
        try:
            async with contextlib.aclosing(self.events) as events:
                async for content in events:
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": content, "more_body": True})
        except Exception as error:
            if not started:
                raise
            if not is_expected(error):
                log.exception("%s failed in mid-stream", self.request_id)
            content = event(error_body(error, self.request_id))
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
