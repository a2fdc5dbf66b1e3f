"""An OpenAI-compatible server without a model, for the gateway benchmark: streams the same 32 pieces to everybody.

python stub_backend.py PORT
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TOKENS = 32
USAGE = {"prompt_tokens": 10, "completion_tokens": TOKENS, "total_tokens": 10 + TOKENS}


def event(**values: Any) -> bytes:
    """A piece of the stream."""
    body = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "stub", **values}
    return f"data: {json.dumps(body)}\n\n".encode()


PIECE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": "hi "}, "finish_reason": None}])
END = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
STREAM = [*[PIECE] * TOKENS, END, event(choices=[], usage=USAGE), b"data: [DONE]\n\n"]


async def chat(request: Request) -> Response:
    """The answer."""
    await request.json()

    async def pieces() -> AsyncIterator[bytes]:
        for piece in STREAM:
            yield piece

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def models(request: Request) -> Response:
    """What it says that it serves."""
    return JSONResponse({"object": "list", "data": [{"id": "stub", "object": "model"}]})


ROUTES = [Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)]

if __name__ == "__main__":
    uvicorn.run(Starlette(routes=ROUTES), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
