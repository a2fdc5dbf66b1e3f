"""A server that streams the same events to everybody: through our transport, or through bare uvicorn and Starlette.

python streams.py ours|bare PORT

Ours is the application with its middlewares, protocol and server settings, and no model: keys of the environment, an
empty database, no ledger entry and no engine behind the route.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

EVENTS = 20
SECONDS = 0.25
"""Between two events: all are answered at the same time, whoever came first."""
PATH = "/v1/chat/completions"
PIECE = (
    b'data: {"id":"x","object":"chat.completion.chunk","created":0,"model":"stub","choices":[{"index":0,"delta":'
    b'{"role":"assistant","content":"hi "},"finish_reason":null}]}\n\n'
)
USAGE = (
    b'data: {"id":"x","object":"chat.completion.chunk","created":0,"model":"stub","choices":[],"usage":'
    b'{"prompt_tokens":10,"completion_tokens":%d,"total_tokens":%d}}\n\n' % (EVENTS, 10 + EVENTS)
)


async def events() -> AsyncGenerator[bytes, None]:
    """What everybody gets."""
    yield PIECE
    for _ in range(EVENTS - 1):
        await asyncio.sleep(SECONDS)
        yield PIECE
    yield USAGE
    yield b"data: [DONE]\n\n"


async def bare(request: Request) -> Response:
    """As Starlette does it."""
    await request.json()
    return StreamingResponse(events(), media_type="text/event-stream")


def ours(port: int) -> None:
    """As we do it."""
    from steelyard import app as composed
    from steelyard.serve.connection import EventStream
    from steelyard.serve.service import open_service
    from steelyard.store.database import opened, sqlite_url
    from steelyard.store.secrets import Secrets

    async def stream(request: Request) -> Response:
        await request.json()
        return EventStream(events(), request.state.request_id)

    with tempfile.TemporaryDirectory() as folder, opened(sqlite_url(Path(folder) / "db"), role="server") as database:
        app = composed.create_app(open_service({}, database, Secrets.make(), Path(folder)))
        app.router.routes.insert(0, Route(PATH, stream, methods=["POST"]))
        server = composed.configure(app)
        server.config.port = port
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(composed.SWITCH_SECONDS)
        asyncio.run(server.serve())


if __name__ == "__main__":
    if sys.argv[1] == "ours":
        ours(int(sys.argv[2]))
    else:
        app = Starlette(routes=[Route(PATH, bare, methods=["POST"])])
        uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
