"""The wire between the HTTP process and an engine process: one message per frame, over a socketpair.

A frame is a 4-byte little-endian length and that many bytes of msgpack: one of the tagged unions `ToEngine` and
`FromEngine`. The engine side blocks, the HTTP side is asyncio. It knows nothing of what the messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from steelyard.errors import ArtifactError
from steelyard.infer.request import FromEngine, ToEngine

MAX_FRAME_BYTES = 64 << 20
LENGTH_BYTES = 4
READ_BYTES = 1 << 18

Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as the bytes of one frame.

    Raises:
        ArtifactError: it is over `MAX_FRAME_BYTES`.
    """
    body = _encoder.encode(message)
    _check_length(len(body))
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


class EngineSocket:
    """The engine's end, blocking. One thread may receive while another sends.

    Args:
        descriptor: the inherited socket; it is owned from here on, and no child of this process inherits it.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(True)

    def receive(self) -> ToEngine | None:
        """The next message; None when the other side is gone.

        Raises:
            ArtifactError: bytes that are no frame of ours.
        """
        header = self._read(LENGTH_BYTES)
        if header is None:
            return None
        length = int.from_bytes(header, "little")
        _check_length(length)
        body = self._read(length)
        return None if body is None else _decode(_to_engine, body)

    def send(self, messages: Sequence[FromEngine]) -> None:
        """Send messages in order, in one system call where possible.

        Raises:
            BrokenPipeError, ConnectionError: the other side is gone.
        """
        self._socket.sendall(b"".join(map(frame, messages)))

    def close(self) -> None:
        """Close the descriptor; a `receive` that is waiting in another thread returns None."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, count: int) -> bytes | None:
        """Exactly `count` bytes, or None if the stream ends before them."""
        content = bytearray()
        while len(content) < count:
            try:
                piece = self._socket.recv(min(count - len(content), 1 << 20))
            except OSError:  # reset by the other side, or closed by ours
                return None
            if not piece:
                return None
            content += piece
        return bytes(content)


class FrameReader:
    """The HTTP side's end: every message that has come, at once. A frame that the engine's end cuts off is dropped.

    Args:
        reader: the socket.
    """

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader, self._rest = reader, bytearray()

    async def receive(self) -> list[FromEngine]:
        """At least one message; none when the engine is gone.

        Raises:
            ArtifactError: bytes that are no frame of ours.
        """
        messages: list[FromEngine] = []
        while not messages:
            try:
                content = await self._reader.read(READ_BYTES)
            except ConnectionError:
                content = b""
            if not content:
                return []
            self._rest += content
            messages = self._take()
        return messages

    def _take(self) -> list[FromEngine]:
        """The whole frames of what was read."""
        messages: list[FromEngine] = []
        at, view = 0, memoryview(self._rest)
        try:
            while len(view) - at >= LENGTH_BYTES:
                length = int.from_bytes(view[at : at + LENGTH_BYTES], "little")
                _check_length(length)
                begin = at + LENGTH_BYTES
                if len(view) - begin < length:
                    break
                messages.append(_decode(_from_engine, view[begin : begin + length]))
                at = begin + length
        finally:
            view.release()
            del self._rest[:at]
        return messages


def _check_length(length: int) -> None:
    if length > MAX_FRAME_BYTES:
        raise ArtifactError(f"a frame of {length} bytes between server and engine; {MAX_FRAME_BYTES} are the limit")


def _decode(decoder: msgspec.msgpack.Decoder[Message], body: bytes | memoryview) -> Message:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ArtifactError(f"a frame between server and engine does not parse: {error}") from None
