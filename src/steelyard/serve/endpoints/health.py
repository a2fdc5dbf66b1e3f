"""`GET /health`, `/live`, `/ready`, `/version`: what an operator's probes ask. Public, so they name nothing."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard import __version__
from steelyard.serve.models import engines
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.service import Service


class Health(msgspec.Struct, frozen=True):
    """How many engines are ready, of how many."""

    status: str
    engines: int
    ready: int


class Live(msgspec.Struct, frozen=True):
    """The process answers."""

    status: str = "live"


class Version(msgspec.Struct, frozen=True):
    """The version of this server."""

    version: str


async def ready(service: Service, request: Request) -> Response:
    """200 when every engine is ready and computes (a canary token now and then shows it), else 503.

    Engines of projects' own models do not count: what one project made is no reason to send nobody here.
    """
    common = {name: served for name, served in service.models.items() if served.project is None}
    statuses = ["stalled" if engine.stalled else engine.status for engine in engines(common)]
    waiting = [status for status in statuses if status != "ready"]
    health = Health(waiting[0] if waiting else "ready", len(statuses), len(statuses) - len(waiting))
    return json_response(health, 503 if waiting else 200, {"retry-after": "1"} if waiting else None)


async def live(service: Service, request: Request) -> Response:
    """200 as long as the process answers."""
    return json_response(Live())


async def version(service: Service, request: Request) -> Response:
    """Which version this is."""
    return json_response(Version(__version__))
