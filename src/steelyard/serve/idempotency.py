"""`Idempotency-Key`: a POST that is sent again is answered again, not done again.

An answer is kept for 24 hours, sealed by the server's root key. The same key for something else is refused (409), as is
one whose first request still runs. What a server began and did not end is done anew under the next one. Errors that a
retry may change are not kept; a made API key is kept without its value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, insert, select, update
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steelyard.errors import ConflictError, PayloadTooLargeError, RequestError, StorageError
from steelyard.serve.auth import Caller
from steelyard.serve.connection import DONE
from steelyard.serve.fingerprint import FormDigest, boundary
from steelyard.serve.protocol.parameters import TEXT, Parameter
from steelyard.store import encryption, tables
from steelyard.store.database import Database

KEPT_SECONDS = 86400
MOST_KEY = 255
MOST_ANSWER = 1 << 20
"""Bytes of an answer that is kept; a larger one is given, and the key is free again."""
MOST_BODY = 32 << 20
"""Bytes of a body that is no form: more than any route takes."""
MOST_UNKEPT = 1000
"""Answers that wait for a database that is away."""
HEADER = b"idempotency-key"
EVENTS = b"text/event-stream; charset=utf-8"
DROPPED = (b"x-request-id", b"openai-processing-ms", b"x-client-request-id", b"date")
"""Headers of an answer that belong to its own request."""

KEY_PARAMETER = Parameter(
    "Idempotency-Key", {**TEXT, "maxLength": MOST_KEY, "pattern": "^[!-~]([ -~]*[!-~])?$"}, place="header"
)
"""How it is described."""

columns = tables.idempotency.c


class Answer(msgspec.Struct, frozen=True):
    """A response that is kept."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Kept(msgspec.Struct, frozen=True):
    """An answer under a key."""

    sealed: bytes
    """Empty: there is none."""
    fingerprint: str
    """Of the request that it answers."""


@dataclass
class Idempotency:
    """ASGI middleware, behind authentication and the limits of bodies.

    Args:
        app: what it stands before.
        database: where answers are kept.
        root: the key that seals them.
        now: Unix seconds.
    """

    app: ASGIApp
    database: Database
    root: bytes
    now: Callable[[], int]
    unkept: dict[tuple[str, str], Kept] = field(default_factory=dict)
    """Answers that could not be written."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, once.

        Raises:
            RequestError: the key cannot be one.
            ConflictError: the key was used for something else, or its first request still runs.
            ClientDisconnect: the client left before the body was there.
        """
        given = [value for name, value in scope.get("headers", []) if name == HEADER]
        caller: Caller | None = scope.get("state", {}).get("caller")
        if scope["type"] != "http" or scope["method"] != "POST" or not given or caller is None:
            await self.app(scope, receive, send)
            return
        key = self._check(given)
        beginning, parted = b"\0".join((scope["raw_path"], scope["query_string"], b"")), boundary(scope)
        form, fingerprint = None, ""
        if parted is not None:  # what it is comes out while it is read
            receive = form = FormDigest(beginning, parted, receive)
        else:
            body, receive = await _read(receive)
            fingerprint = hashlib.sha256(beginning + body).hexdigest()
        owner = caller.project_id or "administration"
        pending = self.unkept.get((owner, key))
        if pending is not None:  # it was answered while the database was away
            await self._settle(owner, key, pending)
        kept = await self.database.write(lambda connection: self._begin(connection, owner, key, fingerprint))
        if kept is not None:
            if form is not None and await form.rest() != kept.fingerprint:
                raise _mismatch()
            await _send(self._open(kept.sealed, owner, key), send)
            return
        recorder = Recorder(send)
        try:
            await self.app(scope, receive, recorder)
        except BaseException:
            self.database.write_soon(lambda connection: self._forget(connection, owner, key))
            raise
        answer = recorder.answer(scope["state"].get("replay"))
        if form is not None:
            answer, fingerprint = answer if form.whole else None, form.hexdigest
        sealed = b"" if answer is None else self._seal(answer, owner, key)
        await self._settle(owner, key, Kept(sealed, fingerprint))
        await recorder.finish()

    async def _settle(self, owner: str, key: str, kept: Kept) -> None:
        """Keep an answer, or forget a key whose request has none; what cannot be written now is not lost."""
        settle = partial(self._keep, kept=kept) if kept.sealed else self._forget
        try:
            await self.database.write(lambda connection: settle(connection, owner=owner, key=key))
        except StorageError:
            if len(self.unkept) < MOST_UNKEPT:
                self.unkept[owner, key] = kept
            raise
        self.unkept.pop((owner, key), None)

    def _check(self, given: list[bytes]) -> str:
        key = given[0].decode("latin-1")
        if len(given) > 1 or not 0 < len(key) <= MOST_KEY or not (key.isascii() and key.isprintable()):
            raise RequestError(
                f"'Idempotency-Key' must be one header of 1 to {MOST_KEY} printable characters", param="Idempotency-Key"
            )
        return key

    def _begin(self, connection: Connection, owner: str, key: str, fingerprint: str) -> Kept | None:
        """Take the key; or the answer that is kept under it. Of a form nobody knows yet what it is (empty)."""
        now, mine = self.now(), (columns.owner == owner, columns.key == key)
        row = connection.execute(select(tables.idempotency).where(*mine)).first()
        if row is not None and row.created_at > now - KEPT_SECONDS:
            if fingerprint and row.fingerprint != fingerprint:
                raise _mismatch()
            if row.answer is not None:
                return Kept(row.answer, row.fingerprint)
            if self.database.is_held(connection, row.holder):
                raise ConflictError(
                    "the first request with this Idempotency-Key still runs: try again shortly",
                    param="Idempotency-Key",
                    code="idempotency_in_progress",
                )
        connection.execute(delete(tables.idempotency).where(*mine))
        values = {"fingerprint": fingerprint, "created_at": now, "holder": self.database.holder, "answer": None}
        connection.execute(insert(tables.idempotency), {"owner": owner, "key": key, **values})
        return None

    def _keep(self, connection: Connection, owner: str, key: str, kept: Kept) -> None:
        values = {"answer": kept.sealed, "fingerprint": kept.fingerprint}
        connection.execute(update(tables.idempotency).where(columns.owner == owner, columns.key == key).values(values))

    def _forget(self, connection: Connection, owner: str, key: str) -> None:
        connection.execute(delete(tables.idempotency).where(columns.owner == owner, columns.key == key))

    def _seal(self, answer: Answer, owner: str, key: str) -> bytes:
        return encryption.seal(self.root, msgspec.msgpack.encode(answer), sealed_name(owner, key))

    def _open(self, sealed: bytes, owner: str, key: str) -> Answer:
        content = encryption.unseal_small(self.root, sealed, sealed_name(owner, key))
        return msgspec.msgpack.decode(content, type=Answer)


def sealed_name(owner: str, key: str) -> str:
    """What an answer is sealed for."""
    return f"{owner} {key}"


@dataclass
class Recorder:
    """Passes a response on and keeps it; its end, which is `[DONE]` to who reads a stream, is held back until then."""

    send: Send
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    held: list[Message] = field(default_factory=list)
    ended: bool = False

    async def __call__(self, message: Message) -> None:
        """Take a message of the response."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], [(bytes(n), bytes(v)) for n, v in message["headers"]]
        elif len(self.body) <= MOST_ANSWER:
            self.body += message.get("body", b"")
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self.ended or message.get("body") == DONE:
            self.held.append(message)
            return
        await self.send(message)

    def answer(self, instead: bytes | None) -> Answer | None:
        """What to keep of it; `instead` is a body without secrets. None: nothing."""
        whole = self.ended and len(self.body) <= MOST_ANSWER
        if (b"content-type", EVENTS) in self.headers:
            whole = whole and self.body.endswith(DONE)  # else it broke off with an error
        if not whole or self.status == 429 or self.status >= 500:
            return None
        body = bytes(self.body) if instead is None else instead
        headers = [(name, value) for name, value in self.headers if name not in (b"content-length", *DROPPED)]
        return Answer(self.status, headers, body)

    async def finish(self) -> None:
        """Send the end."""
        for message in self.held:
            await self.send(message)


def expire(connection: Connection, now: int) -> None:
    """Forget answers that are old."""
    connection.execute(delete(tables.idempotency).where(columns.created_at <= now - KEPT_SECONDS))


def _mismatch() -> ConflictError:
    reason = "this Idempotency-Key was used for another request: use a new one"
    return ConflictError(reason, param="Idempotency-Key", code="idempotency_mismatch")


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that gives it again.

    Raises:
        PayloadTooLargeError: it is larger than any that is taken.
        ClientDisconnect: the client left before it was sent. Nothing is begun under its key: part of a body would be
            another request than the one that is sent again.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > MOST_BODY:
            raise PayloadTooLargeError(f"a body of over {MOST_BODY >> 20} MB that is no form")
        if not message.get("more_body", False):
            break
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return bytes(body), again


async def _send(answer: Answer, send: Send) -> None:
    headers: list[Any] = [*answer.headers, (b"content-length", str(len(answer.body)).encode())]
    headers.append((b"idempotent-replayed", b"true"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})
