"""`GET /v1/models` and `GET /v1/models/{id}`: what can be asked here."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.serve import aliases
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.service import Service


class Model(msgspec.Struct, frozen=True):
    """A model that requests may name."""

    id: str
    created: int
    owned_by: str = "steelyard"
    shutdown_date: int | None = None
    lineage: Any = msgspec.UNSET
    certificate: Any = msgspec.UNSET
    price: Any = msgspec.UNSET
    """Of one model alone: nano-dollars a token, by kind."""
    object: Literal["model"] = "model"


class ModelDeleted(msgspec.Struct, frozen=True):
    """A model is gone."""

    id: str
    deleted: bool = True
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, frozen=True):
    """Every model."""

    data: list[Model]
    object: Literal["list"] = "list"


async def list_models(service: Service, request: Request) -> Response:
    """Every model that this project may ask, base models before their adapters."""
    models = service.visible(request.state.caller.project)
    named = [
        msgspec.structs.replace(_shape(service, models[row["model"]]), id=name)
        for name, row in sorted(service.names.aliases.items())
        if row["model"] in models
    ]
    return json_response(ModelList([_shape(service, served) for served in models.values()] + named))


async def retrieve(service: Service, request: Request) -> Response:
    """One model."""
    caller = request.state.caller
    served = service.find(request.path_params["model_id"], caller.project, caller.key_id)
    shape = await asyncio.to_thread(_whole, service, served)
    return json_response(shape)


async def delete(service: Service, request: Request) -> Response:
    """Remove a model that a job of this project made."""
    name = request.path_params["model_id"]
    await service.tuned.remove(request.state.caller.project, name)
    return json_response(ModelDeleted(name))


def _shape(service: Service, served: ServedModel) -> Model:
    owner = "steelyard" if served.project is None else served.project
    return Model(served.id, served.created, owner, shutdown_date=service.names.shutdowns.get(served.id))


def _whole(service: Service, served: ServedModel) -> Model:
    """With what its owner may know: where it comes from, what its compression cost, its price."""
    lineage: dict[str, Any] | None = None
    with contextlib.suppress(CheckpointError):
        found = manifest.read(served.engine.checkpoint)
        lineage = {"checkpoint": found.id, "parent": found.parent, "source": found.source, "metrics": found.metrics}
    return msgspec.structs.replace(
        _shape(service, served),
        lineage=lineage,
        certificate=aliases.certificate(served),
        price=msgspec.to_builtins(service.prices.quote(*served.names).price),
    )
