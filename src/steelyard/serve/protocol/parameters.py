"""Parameters of a request that stand outside its body: how they are described, and what none may hold.

Who reads them checks the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import PathNotFoundError, RequestError

Handler = Callable[[Request], Awaitable[Response]]
Schema = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """A parameter."""

    name: str
    schema: Schema
    required: bool = False
    place: Literal["query", "path", "header"] = "query"
    style: Literal["deepObject"] | None = None
    """Of an object in a query: `name[key]=value`."""


def integer_from(least: int, most: int, default: int | None = None) -> Schema:
    """An integer within bounds."""
    schema: Schema = {"type": "integer", "minimum": least, "maximum": most}
    return schema if default is None else {**schema, "default": default}


def one_of(*values: str) -> Schema:
    """One of these texts."""
    return {"type": "string", "enum": list(values)}


def some_of(items: Schema, most: int) -> Schema:
    """A parameter that may be there several times."""
    return {"type": "array", "items": items, "maxItems": most}


TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}


def storable(handler: Handler) -> Handler:
    """A handler for requests without the character NUL in their path and query: not every database has it in texts."""

    async def checked(request: Request) -> Response:
        if "\0" in request.scope["path"]:
            raise PathNotFoundError("there is nothing here whose name has the character NUL")
        for name, value in request.query_params.multi_items():
            if "\0" in name or "\0" in value:
                raise RequestError(f"'{name[:80]}' has the character NUL: remove it", param=name[:80])
        return await handler(request)

    return checked
