"""`POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`: adapters that come and go while the server runs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from steelyard.serve.adapters import AdapterFolder
from steelyard.serve.protocol.adapters import AdapterStatus, LoadRequest, UnloadRequest
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import parse
from steelyard.serve.service import Service


async def load(adapters: AdapterFolder, service: Service, request: Request) -> Response:
    """Serve an adapter from now on, in the place of one that has its name."""
    body = parse(LoadRequest, await request.body())
    digest = await adapters.load(body.lora_name, body.lora_path, body.base_model_name)
    return json_response(AdapterStatus(body.lora_name, True, digest))


async def unload(adapters: AdapterFolder, service: Service, request: Request) -> Response:
    """Serve an adapter no more."""
    body = parse(UnloadRequest, await request.body())
    await adapters.unload(body.lora_name)
    return json_response(AdapterStatus(body.lora_name, False))
