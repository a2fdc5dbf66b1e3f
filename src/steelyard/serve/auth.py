"""Who may ask: API keys, where they are kept, and the middleware that stands ahead of everything else.

Knows nothing of models, bodies or projects. A key is kept as its id and an HMAC under a server pepper: what is on
disk does not give it back. Every path that is not in `PUBLIC_ROUTES` needs a key, whether it exists or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import string
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from steelyard.errors import AuthenticationError, ConfigError

PUBLIC_ROUTES = frozenset({"/health", "/live", "/ready", "/version"})
"""Paths that anybody may GET. The only such list."""

KEY_VARIABLE = "STEELYARD_API_KEY"
HOME_VARIABLE = "STEELYARD_HOME"

PREFIX = "sk-sy-"
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
SECRET_LENGTH, CHECKSUM_LENGTH = 30, 6
STATE_FILE = "keys.json"
MAX_STATE_BYTES = 1 << 20


def checksum(secret: str) -> str:
    """CRC-32 of a key's secret part in base62, six characters."""
    value, digits = zlib.crc32(secret.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        value, digit = divmod(value, len(BASE62))
        digits = BASE62[digit] + digits
    return digits


def new_key() -> str:
    """A fresh key: `sk-sy-`, 30 random base62 characters (178 bits), 6 of checksum."""
    secret = "".join(secrets.choice(BASE62) for _ in range(SECRET_LENGTH))
    return PREFIX + secret + checksum(secret)


def is_well_formed(key: str) -> bool:
    """Whether a key has the form of ours and its checksum is right. Says nothing of who may use it."""
    secret, check = key[len(PREFIX) : -CHECKSUM_LENGTH], key[-CHECKSUM_LENGTH:]
    of_form = key.startswith(PREFIX) and len(secret) == SECRET_LENGTH and set(secret) <= set(BASE62)
    return of_form and check == checksum(secret)


@dataclass(frozen=True, repr=False)
class Keys:
    """The keys that are accepted."""

    pepper: bytes
    """32 random bytes that the stored values are useless without."""
    hashes: Mapping[str, bytes]
    """HMAC-SHA256 of a key under the pepper, by key id."""

    @classmethod
    def holding(cls, key: str) -> Keys:
        """Accept exactly this key."""
        pepper = secrets.token_bytes(32)
        return cls(pepper, {f"key_{secrets.token_hex(8)}": _hash(pepper, key)})

    def identify(self, key: str) -> str | None:
        """The id of a presented key, or None. Takes the same time whichever it is."""
        presented, found = _hash(self.pepper, key), None
        for key_id, stored in self.hashes.items():
            if hmac.compare_digest(presented, stored):
                found = key_id
        return found


def open_keys(environment: Mapping[str, str] = os.environ) -> tuple[Keys, str | None]:
    """The keys of this server, and the new one if this is the first start: it cannot be shown again.

    `STEELYARD_API_KEY`, if it is not empty, is the one key and nothing is stored. Otherwise the state folder is asked:
    `STEELYARD_HOME` or `~/.local/share/steelyard`.

    Raises:
        ConfigError: the variable holds what no header can carry, or the state folder cannot be read or written, or its
            key file is broken.
    """
    if key := environment.get(KEY_VARIABLE):
        if key != key.strip() or not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{KEY_VARIABLE} holds what no header can carry: use printable ASCII, no space around it")
        return Keys.holding(key), None
    path = key_file(environment)
    try:
        key = None if path.exists() else new_key()
        if key is not None and not _create(path, _to_bytes(Keys.holding(key))):
            key = None  # another server has just made the first key
        return _read(path), key
    except OSError as error:
        raise ConfigError(
            f"the API keys cannot be kept in '{path}' ({error.strerror}): set {HOME_VARIABLE} to a folder of your own,"
            f" or give a key in {KEY_VARIABLE}"
        ) from None


def key_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the hashes of the keys are kept."""
    home = environment.get(HOME_VARIABLE)
    return (Path(home) if home else Path.home() / ".local/share/steelyard") / STATE_FILE


class Authentication:
    """ASGI middleware: no valid key, no entry, unless the path is public. It reads headers and nothing else."""

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed.

        Raises:
            AuthenticationError: the key is missing, malformed or not ours.
        """
        if scope["type"] == "http":
            if scope["path"] not in PUBLIC_ROUTES or scope["method"] not in ("GET", "HEAD"):
                scope.setdefault("state", {})["key_id"] = self._authenticate(scope)
        elif scope["type"] != "lifespan":
            raise AuthenticationError("only HTTP is served here")
        await self.app(scope, receive, send)

    def _authenticate(self, scope: Scope) -> str:
        headers: list[bytes] = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = headers[0].decode("latin-1").partition(" ") if len(headers) == 1 else ("", "", "")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise AuthenticationError("no API key: send the header 'Authorization: Bearer YOUR_KEY'")
        key_id = self.keys.identify(key)
        if key_id is None:
            mistyped = key.startswith(PREFIX) and not is_well_formed(key)
            raise AuthenticationError(
                "this API key is mistyped: its checksum is wrong; copy it again"
                if mistyped
                else "this API key is not accepted here: use the one that was printed when the server first started,"
                " or let whoever runs it remove its keys.json and start it again for a new one"
            )
        return key_id


def _hash(pepper: bytes, key: str) -> bytes:
    return hmac.digest(pepper, key.encode("utf-8", "surrogateescape"), hashlib.sha256)


def _to_bytes(keys: Keys) -> bytes:
    hashes = [{"id": key_id, "hmac_sha256": value.hex()} for key_id, value in keys.hashes.items()]
    return msgspec.json.format(msgspec.json.encode({"pepper": keys.pepper.hex(), "keys": hashes})) + b"\n"


def _read(path: Path) -> Keys:
    try:
        with path.open("rb") as file:
            state = msgspec.json.decode(file.read(MAX_STATE_BYTES))
        hashes = {str(key["id"]): bytes.fromhex(key["hmac_sha256"]) for key in state["keys"]}
        pepper = bytes.fromhex(state["pepper"])
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError):
        hashes, pepper = {}, b""
    if len(pepper) != 32 or not hashes:
        raise ConfigError(f"'{path}' is no key file: move it away, and the next start makes a new key")
    return Keys(pepper, hashes)


def _create(path: Path, content: bytes) -> bool:
    """Write `content` to a private file that did not exist, whole or not at all; False if it does by now."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(prefix=f".aside-{path.name}-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)  # unlike a rename, never replaces
            return True
        return False
    finally:
        Path(name).unlink(missing_ok=True)
