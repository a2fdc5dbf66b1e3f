"""The OpenAPI 3.1 document of a table of routes: what each takes, what it gives, which key it needs.

Request bodies are described by their pydantic models, answers by their structs, so the document says what the server
checks. It knows no service and no request.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from steelyard import __version__
from steelyard.serve.endpoint import Endpoint, Form
from steelyard.serve.idempotency import KEY_PARAMETER
from steelyard.serve.protocol.errors import ErrorBody
from steelyard.serve.protocol.fields import Fields
from steelyard.serve.protocol.parameters import TEXT, Parameter, Schema

PLACE = "#/components/schemas/"
STREAM = "text/event-stream"
PATH_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The document of these routes."""
    bodies = {one.takes for one in endpoints if isinstance(one.takes, type)}
    answers = [one.answer for one in endpoints if not isinstance(one.answer, str)]
    events = [one.events for one in endpoints if one.events is not None]
    requests, request_schemas = _requests(sorted(bodies, key=lambda body: body.__qualname__))
    responses, response_schemas = _responses([ErrorBody, *answers, *events])
    assert not request_schemas.keys() & response_schemas.keys(), "a request and a response have one name"
    paths: dict[str, Any] = {}
    for one in endpoints:
        operation = _operation(one, requests, responses)
        paths.setdefault(PATH_PARAMETER.sub(r"{\1}", one.path), {})[one.method.lower()] = operation
    error = {"description": "What went wrong.", "content": _json(responses[ErrorBody])}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Steelyard", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**request_schemas, **response_schemas},
            "responses": {"Error": error},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _requests(bodies: Sequence[type[Fields]]) -> tuple[dict[type[Fields], Schema], dict[str, Schema]]:
    """A reference for each body, and what they refer to."""
    found, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=PLACE + "{model}")
    return {body: found[body, "validation"] for body in bodies}, definitions.get("$defs", {})


def _responses(shapes: Sequence[Any]) -> tuple[dict[Any, Schema], dict[str, Schema]]:
    """A reference for each struct, and what they refer to."""
    found, definitions = msgspec.json.schema_components(shapes, ref_template=PLACE + "{name}")
    return dict(zip(shapes, found, strict=True)), definitions


def _operation(one: Endpoint, requests: dict[type[Fields], Schema], responses: dict[Any, Schema]) -> dict[str, Any]:
    handler = one.handler.func if isinstance(one.handler, partial) else one.handler
    content = {one.answer: {"schema": TEXT}} if isinstance(one.answer, str) else _json(responses[one.answer])
    content |= {kind: {"schema": TEXT} for kind in one.media}
    if one.events is not None:
        content[STREAM] = {"schema": _event(responses[one.events], responses[ErrorBody])}
    answer = {"description": "The answer.", "content": content}
    operation: dict[str, Any] = {
        "operationId": "_".join(re.findall(r"\w+", f"{one.method.lower()} {one.path}".replace(":path", ""))),
        "summary": (inspect.getdoc(handler) or "").partition("\n")[0],
        "security": [] if one.permission is None else [{"key": [one.permission]}],
        "parameters": [_parameter(parameter) for parameter in _parameters(one)],
        "responses": {
            **{str(status): answer for status in one.statuses},
            "4XX": {"$ref": "#/components/responses/Error"},
            "5XX": {"$ref": "#/components/responses/Error"},
        },
    }
    if isinstance(one.takes, Form):
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": one.takes.schema}}}
    elif isinstance(one.takes, type):
        operation["requestBody"] = {"required": True, "content": _json(requests[one.takes])}
    return operation


def _event(event: Schema, error: Schema) -> Schema:
    """A server-sent event: what its `data` holds."""
    content = {**TEXT, "contentMediaType": "application/json", "contentSchema": {"anyOf": [event, error]}}
    data = {"anyOf": [{"const": "[DONE]"}, content]}
    return {"description": "Of each event.", "type": "object", "properties": {"data": data}, "required": ["data"]}


def _parameters(one: Endpoint) -> list[Parameter]:
    own = one.takes if isinstance(one.takes, tuple) else ()
    described = {parameter.name for parameter in own}
    names = [match[1] for match in PATH_PARAMETER.finditer(one.path) if match[1] not in described]
    more = [Parameter(name, {**TEXT, "minLength": 1}, required=True, place="path") for name in names]
    if one.method == "POST":
        more.append(KEY_PARAMETER)
    return [*more, *own]


def _parameter(parameter: Parameter) -> dict[str, Any]:
    styled = {} if parameter.style is None else {"style": parameter.style, "explode": True}
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.required,
        "schema": parameter.schema,
        **styled,
    }


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
