"""`GET /openapi.json`: every route as an OpenAPI 3.1 document. Public: it tells what the code tells."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from steelyard.serve.service import Service

Document = dict[str, Any]


async def read(service: Service, request: Request) -> Response:
    """What can be asked of this server, and how."""
    return Response(request.app.state.openapi, media_type="application/json")
