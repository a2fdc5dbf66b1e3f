"""Parameters of a request that stand outside its body, as they are described; who reads them checks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
