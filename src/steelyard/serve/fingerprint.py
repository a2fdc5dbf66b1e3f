"""A form's digest, taken while it is read: whether another is the same one, whatever boundary parts it.

A form may be as large as a file, and a client draws its boundary anew when it sends one again: the digest is that of
the body without the boundary, and nothing is held.
"""

from __future__ import annotations

import hashlib
from email.message import Message as Header

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope


def boundary(scope: Scope) -> bytes | None:
    """What parts a request's form, or anything if it does not say: nobody will read it. None: its body is no form."""
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    if not kind.startswith(b"multipart/"):
        return None
    header = Header()
    header["content-type"] = kind.decode("latin-1")
    found = header.get_param("boundary")
    return (found.encode("latin-1", "replace") if isinstance(found, str) else b"") or kind


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
            self._digest.update(piece)
        kept = max(0, len(last) - len(self._boundary) + 1)
        self._digest.update(last[:kept])
        self._carried = last[kept:]
