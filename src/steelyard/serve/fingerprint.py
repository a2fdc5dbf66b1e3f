"""A form's digest, taken while it is read: whether another is the same one, whatever boundary parts it.

A form may be as large as a file, and a client draws its boundary anew when it sends one again: the digest is that of
the body with another boundary, always the same, and nothing is held.
"""

from __future__ import annotations

import hashlib

from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope


def boundary(scope: Scope) -> bytes | None:
    """What parts a request's form, or anything if it does not say: nobody will read it. None: its body is no form."""
    given = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    kind, options = parse_options_header(given)
    return options.get(b"boundary") or kind if kind.startswith(b"multipart/") else None


BETWEEN = hashlib.sha256(b"where a boundary was").digest()


class FormDigest:
    """Stands for a form's `receive`.

    Args:
        beginning: what the digest begins with, such as the address.
        boundary: what parts the form.
        receive: gives it.
    """

    def __init__(self, beginning: bytes, boundary: bytes, receive: Receive) -> None:
        self._digest, self._boundary, self._receive = hashlib.sha256(beginning), boundary, receive
        self._carried = b""
        """May be the beginning of a boundary."""
        self.whole = False
        """Whether all of it has been read."""

    async def __call__(self) -> Message:
        """The next part, which is taken into the digest."""
        message = await self._receive()
        if message["type"] == "http.request" and not self.whole:
            self._take(message.get("body", b""))
            self.whole = not message.get("more_body", False)
        return message

    async def rest(self) -> str:
        """Read what is left, and the digest. Raises ClientDisconnect: the client left before its end."""
        while not self.whole:
            if (await self())["type"] == "http.disconnect":
                raise ClientDisconnect
        return self.hexdigest

    @property
    def hexdigest(self) -> str:
        """Of what has been read."""
        digest = self._digest.copy()
        digest.update(self._carried)
        return digest.hexdigest()

    def _take(self, part: bytes) -> None:
        *before, last = (self._carried + part).split(self._boundary)
        for piece in before:
            self._digest.update(piece + BETWEEN)
        kept = max(0, len(last) - len(self._boundary) + 1)
        self._digest.update(last[:kept])
        self._carried = last[kept:]
