"""How much and how long a client may send: body size, deadlines for headers, bodies and slow readers.

Knows nothing of what is sent. The size and the time of a body are limited by ASGI middleware; what happens
before a request exists and after a response has left is limited by the protocol class that uvicorn is given.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from steelyard.errors import PayloadTooLargeError, RequestError

MAX_BODY_BYTES = 4 << 20
BODY_SECONDS = 30.0
HEADER_SECONDS = 10.0
HEADER_BYTES = 1 << 16
STALL_SECONDS = 30.0
UNSENT_BYTES = 1 << 14
"""What the system takes for a reader before his connection must wait. Linux would take 2.5 MB on its own."""


class BodyLimit:
    """ASGI middleware: a body of at most `max_bytes`, sent within `seconds`; refused while it comes, not after.

    Paths in `larger` have limits of their own.

    It raises where the body is read, so that whoever reads it unwinds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int = MAX_BODY_BYTES,
        seconds: float = BODY_SECONDS,
        larger: Mapping[str, tuple[int, float]] | None = None,
    ) -> None:
        self.app, self.max_bytes, self.seconds, self.larger = app, max_bytes, seconds, larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose body is being counted.

        Raises:
            PayloadTooLargeError: `content-length` says more than is allowed; also raised by `receive`.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most, seconds = self.larger.get(scope["path"], (self.max_bytes, self.seconds))
        _check(next((_length(value) for name, value in scope["headers"] if name == b"content-length"), 0), most)
        received, complete, deadline = 0, False, time.monotonic() + seconds

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is only that the client leaves
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise RequestError(
                    f"the body was not sent within {seconds:g} s: send it again", code="request_timeout"
                ) from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                _check(received, most)
                complete = not message.get("more_body", False)
            return message

        await self.app(scope, limited, send)


def _check(size: int, most: int) -> None:
    if size > most:
        raise PayloadTooLargeError(f"the body is over {most} bytes, the limit here: send less at once")


def _length(value: bytes) -> int:
    return int(value) if value.isdigit() and len(value) < 20 else 0


class DeadlineProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with two deadlines and limits that it lacks.

    A request's header must be complete `HEADER_SECONDS` after the connection or the header's first byte; a reader
    must make room for more within `STALL_SECONDS`. A header has `HEADER_BYTES` at most. Past any of these the
    connection is closed at once. Whatever a reader has not taken counts as a stall, also what is left of an answer
    that has ended: little is held for him (`UNSENT_BYTES` and one event), and he is found out soon.
    """

    header_seconds = HEADER_SECONDS
    stall_seconds = STALL_SECONDS
    _header_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _header_size: int | None = None
    """Bytes of a header that has begun; None outside of one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(self.header_seconds, transport.abort)
        transport.set_write_buffer_limits(high=0)
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def data_received(self, data: bytes) -> None:
        """A client has sent something."""
        super().data_received(data)
        if self._header_size is not None:
            self._header_size += len(data)
            if self._header_size > HEADER_BYTES:
                self.transport.abort()
        if self.cycle is not None and not self.cycle.response_complete:
            self._header_timer = _cancel(self._header_timer)
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self.transport.abort)

    def on_message_begin(self) -> None:
        """A header begins."""
        self._header_size = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """It is complete."""
        self._header_size = None
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._header_timer, self._stall_timer = _cancel(self._header_timer), _cancel(self._stall_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._stall_timer = _cancel(self._stall_timer)


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer that may be running; returns what takes its place: none."""
    if timer is not None:
        timer.cancel()
    return None
