"""`GET /v1/models` and `GET /v1/models/{id}`: what can be asked here."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.service import Service


class Model(msgspec.Struct, frozen=True):
    """A model that requests may name."""

    id: str
    created: int
    owned_by: str = "steelyard"
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
    return json_response(ModelList([_shape(served) for served in models.values()]))


async def retrieve(service: Service, request: Request) -> Response:
    """One model."""
    return json_response(_shape(service.find(request.path_params["model_id"], request.state.caller.project)))


async def delete(service: Service, request: Request) -> Response:
    """Remove a model that a job of this project made."""
    name = request.path_params["model_id"]
    await service.tuned.remove(request.state.caller.project, name)
    return json_response(ModelDeleted(name))


def _shape(served: ServedModel) -> Model:
    return Model(served.id, served.created, "steelyard" if served.project is None else served.project)
