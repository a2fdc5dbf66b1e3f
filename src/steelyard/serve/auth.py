"""Who asks, and whether he may: the middleware that stands ahead of everything else.

Every path that is not in `PUBLIC_ROUTES` needs a key, whether it exists or not; what a key may do is asked per
route, by its scopes. Who asks is known from here on as a `Caller`; nothing that a client sends says it again.
"""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, select, update
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from steelyard.errors import AuthenticationError, ConfigError, PermissionDeniedError
from steelyard.serve.keys import PREFIX, is_well_formed, mac
from steelyard.store import tables
from steelyard.store.database import Database

PUBLIC_ROUTES = frozenset({"/health", "/live", "/openapi.json", "/ready", "/version"})
"""Paths that anybody may GET. The only such list."""

KEY_VARIABLE = "STEELYARD_API_KEY"
ADMIN_VARIABLE = "STEELYARD_ADMIN_KEY"

Permission = Literal["inference", "files", "fine_tuning", "admin.read", "admin.write"]
PROJECT_SCOPES: tuple[Permission, ...] = ("inference", "files", "fine_tuning")
ADMIN_SCOPES: tuple[Permission, ...] = ("admin.read", "admin.write")

REMEMBERED_SECONDS = 2.0
"""How long a key that another process took back may still work."""
MOST_REMEMBERED = 10_000
NOTED_SECONDS = 60
"""How exactly a key's last use is noted."""


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    key_id: str
    project_id: str | None
    """None: an administrator, who has no project."""
    scopes: frozenset[str]

    @property
    def project(self) -> str:
        """The project whose key this is; routes for projects are closed to administrators."""
        assert self.project_id is not None
        return self.project_id


@dataclass
class KeyRing:
    """The keys that are accepted, in the database and from the environment.

    Args:
        database: where keys are.
        pepper: what they are kept under.
        fixed: keys that are not in the database, by their mac.
    """

    database: Database
    pepper: bytes
    fixed: Mapping[bytes, Caller] = field(default_factory=dict)
    _known: dict[bytes, tuple[float, Caller]] = field(default_factory=dict)
    _noted: dict[str, float] = field(default_factory=dict)

    async def identify(self, key: str) -> Caller | None:
        """Whose key it is, or None."""
        presented = mac(self.pepper, key)
        for kept, caller in self.fixed.items():
            if hmac.compare_digest(kept, presented):
                return caller
        now = time.monotonic()
        remembered = self._known.get(presented)
        if remembered is not None and now <= remembered[0]:
            caller = remembered[1]
        else:
            found = await self._look_up(key, presented)
            if found is None:
                return None
            caller = found
            self._known[presented] = now + REMEMBERED_SECONDS, caller
        if now - self._noted.get(caller.key_id, -NOTED_SECONDS) >= NOTED_SECONDS:
            self._noted[caller.key_id] = now
            self.database.write_soon(_note_use(caller.key_id, int(time.time())))
        return caller

    async def _look_up(self, key: str, presented: bytes) -> Caller | None:
        self._known.pop(presented, None)
        if len(self._known) >= MOST_REMEMBERED:
            self._known.clear()
        if not is_well_formed(key):
            return None
        return await self.database.read(lambda connection: find(connection, presented, int(time.time())))

    def forget(self) -> None:
        """Ask the database again: a key was taken back, or a project archived."""
        self._known.clear()


def find(connection: Connection, kept: bytes, now: int) -> Caller | None:
    """The caller whose key has this mac, unless it has expired or its project is archived."""
    keys, projects = tables.api_keys.c, tables.projects.c
    row = connection.execute(
        select(keys.id, keys.project_id, keys.scopes, keys.expires_at, projects.archived_at)
        .join_from(tables.api_keys, tables.projects, isouter=True)
        .where(keys.mac == kept)
    ).first()
    if row is None or row.archived_at is not None or (row.expires_at is not None and row.expires_at <= now):
        return None
    return Caller(row.id, row.project_id, frozenset(row.scopes))


def fixed_keys(pepper: bytes, project_id: str, environment: Mapping[str, str] = os.environ) -> dict[bytes, Caller]:
    """The keys that the environment names: one of the first project, one of an administrator. Neither is stored.

    Raises:
        ConfigError: one holds what no header can carry, or both are the same.
    """
    callers = {
        KEY_VARIABLE: Caller("key_environment", project_id, frozenset(PROJECT_SCOPES)),
        ADMIN_VARIABLE: Caller("key_environment_admin", None, frozenset(ADMIN_SCOPES)),
    }
    found: dict[bytes, Caller] = {}
    for variable, caller in callers.items():
        key = environment.get(variable)
        if not key:
            continue
        if key != key.strip() or not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{variable} holds what no header can carry: use printable ASCII, no space around it")
        if mac(pepper, key) in found:
            raise ConfigError(f"{KEY_VARIABLE} and {ADMIN_VARIABLE} are the same: an admin key is never a project key")
        found[mac(pepper, key)] = caller
    return found


class Authentication:
    """ASGI middleware: no valid key, no entry, unless the path is public. It reads headers and nothing else."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed.

        Raises:
            AuthenticationError: the key is missing, malformed or not ours.
        """
        if scope["type"] == "http":
            if scope["path"] not in PUBLIC_ROUTES or scope["method"] not in ("GET", "HEAD"):
                scope.setdefault("state", {})["caller"] = await self._authenticate(scope)
        elif scope["type"] != "lifespan":
            raise AuthenticationError("only HTTP is served here")
        await self.app(scope, receive, send)

    async def _authenticate(self, scope: Scope) -> Caller:
        headers: list[bytes] = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = headers[0].decode("latin-1").partition(" ") if len(headers) == 1 else ("", "", "")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise AuthenticationError("no API key: send the header 'Authorization: Bearer YOUR_KEY'")
        caller = await self.keys.identify(key)
        if caller is None:
            mistyped = key.startswith(PREFIX) and not is_well_formed(key)
            raise AuthenticationError(
                "this API key is mistyped: its checksum is wrong; copy it again"
                if mistyped
                else "this API key is not valid here"
            )
        return caller


Handler = Callable[[Request], Awaitable[Response]]


def allowed(permission: Permission, handler: Handler) -> Handler:
    """A handler for those alone whose key has a scope.

    The handler raises `PermissionDeniedError` for others, before anything of the request is read.
    """

    async def guarded(request: Request) -> Response:
        caller: Caller = request.state.caller
        if permission not in caller.scopes:
            kind = "an admin key" if permission in ADMIN_SCOPES else "a project's key"
            raise PermissionDeniedError(
                f"this key may not do this: it takes {kind} with the scope '{permission}'",
                code="insufficient_permissions",
            )
        return await handler(request)

    return guarded


def _note_use(key_id: str, now: int) -> Callable[[Connection], Any]:
    columns = tables.api_keys.c
    return lambda connection: connection.execute(
        update(tables.api_keys).where(columns.id == key_id).values(last_used_at=now)
    )
