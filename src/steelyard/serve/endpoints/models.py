"""`GET /v1/models` and `GET /v1/models/{id}`: what can be asked here."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.serve.models import Models, ServedModel, find
from steelyard.serve.protocol.errors import json_response


class Model(msgspec.Struct, frozen=True):
    """A model that requests may name."""

    id: str
    created: int
    owned_by: str = "steelyard"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, frozen=True):
    """Every model."""

    data: list[Model]
    object: Literal["list"] = "list"


async def list_models(models: Models, request: Request) -> Response:
    """Every model, base models before their adapters."""
    return json_response(ModelList([_shape(served) for served in models.values()]))


async def retrieve(models: Models, request: Request) -> Response:
    """One model."""
    return json_response(_shape(find(models, request.path_params["model_id"])))


def _shape(served: ServedModel) -> Model:
    return Model(served.id, served.created)
