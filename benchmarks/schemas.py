"""Fifty JSON schemas of rising difficulty, ten kinds in five steps each; see `decoding.py`.

Strings are as long as a model likes in half of them; all else has bounds, as people who ask for JSON write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
SHORT: Schema = {"type": "string", "maxLength": 24}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 1000}
FIELDS: list[tuple[str, Schema]] = [
    ("name", TEXT),
    ("age", {"type": "integer", "minimum": 0, "maximum": 120}),
    ("member", {"type": "boolean"}),
    ("city", SHORT),
    ("score", {"type": "number", "minimum": 0, "maximum": 10}),
]


def record(properties: dict[str, Schema], **others: Any) -> Schema:
    """An object with all of these, and nothing else."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **others,
    }


def flat(step: int) -> Schema:
    """More and more fields."""
    return record(dict(FIELDS[: step + 1]))


def nested(step: int) -> Schema:
    """Objects in objects."""
    inner: Schema = record({"city": SHORT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})
    for depth in range(step):
        inner = record({f"level{depth}": inner, "note": SHORT})
    return record({"name": TEXT, "address": inner})


def lists(step: int) -> Schema:
    """Arrays with bounds, of simple things, then of objects, then of arrays."""
    item: Schema = [SHORT, COUNT, record({"item": SHORT, "count": COUNT}), {"type": "boolean"}, SHORT][step]
    array: Schema = {"type": "array", "items": item, "minItems": min(step, 2), "maxItems": 4}
    if step >= 3:
        array = {"type": "array", "items": array, "minItems": 1, "maxItems": 2}
    return record({"title": SHORT, "items": array})


def choices(step: int) -> Schema:
    """Enums and constants of several types."""
    kinds = ["low", "middle", "high", "very high", "unknown"][: step + 2]
    fields: dict[str, Schema] = {"level": {"enum": kinds}, "version": {"const": step}}
    for number in range(step):
        fields[f"choice{number}"] = {"enum": [number, str(number), None, True][: number + 2]}
    return record(fields)


def numbers(step: int) -> Schema:
    """Ranges: closed, open, negative, of integers and of others."""
    ranges: list[Schema] = [
        {"type": "integer", "minimum": 1, "maximum": 6},
        {"type": "integer", "exclusiveMinimum": -40, "maximum": 50},
        {"type": "number", "minimum": -1, "maximum": 1},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
        {"type": "integer", "minimum": 1900, "maximum": 2026},
    ]
    return record({f"value{number}": ranges[number] for number in range(step + 1)})


def patterns(step: int) -> Schema:
    """Texts of a form."""
    forms: list[Schema] = [
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        {"type": "string", "format": "date"},
        {"type": "string", "pattern": "^(\\+[0-9]{1,3} )?[0-9]{3}-[0-9]{4}$"},
        {"type": "string", "format": "uuid"},
        {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
    ]
    return record({f"code{number}": forms[number] for number in range(step + 1)})


def unions(step: int) -> Schema:
    """One of several shapes, told apart by a constant or not."""
    shapes: list[Schema] = [
        {"type": "null"},
        SHORT,
        record({"kind": {"const": "circle"}, "radius": COUNT}),
        record({"kind": {"const": "square"}, "side": COUNT}),
        record({"kind": {"const": "text"}, "words": {"type": "array", "items": SHORT, "maxItems": 3}}),
        {"type": "boolean"},
    ]
    return record({"id": COUNT, "shape": {"anyOf": shapes[: step + 2]}})


def recursive(step: int) -> Schema:
    """Definitions that name themselves: a list, a tree, an expression, a thread, two that name each other."""
    some = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}
    next_: Schema = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    nodes: list[Schema] = [
        record({"value": COUNT, "next": next_}),
        record({"label": SHORT, "children": some}),
        record({"left": next_, "operator": {"enum": ["+", "-", "*"]}, "right": next_}),
        record({"author": SHORT, "text": SHORT, "replies": some}),
        record({"leaf": {"type": "boolean"}, "branch": {"anyOf": [{"$ref": "#/$defs/branch"}, {"type": "null"}]}}),
    ]
    branch = record({"weight": COUNT, "node": {"$ref": "#/$defs/node"}})
    return record({"root": {"$ref": "#/$defs/node"}}, **{"$defs": {"node": nodes[step], "branch": branch}})


def optional(step: int) -> Schema:
    """Fields that may be missing, and objects with names of the model's own."""
    fields = dict(FIELDS[: step + 1])
    schema = {**record(fields), "required": list(fields)[: step // 2]}
    if step >= 3:
        tags = {"type": "object", "additionalProperties": COUNT, "maxProperties": 3}
        schema = {**schema, "properties": {**fields, "tags": tags}}
    return schema


def whole(step: int) -> Schema:
    """What people ask for: a verdict, an event, an order, an invoice, a recipe."""
    money: Schema = {"type": "number", "minimum": 0, "maximum": 100000}
    date: Schema = {"type": "string", "format": "date"}
    address = record({"street": SHORT, "city": SHORT, "country": {"type": "string", "pattern": "^[A-Z]{2}$"}})
    line = record({"product": SHORT, "quantity": {"type": "integer", "minimum": 1, "maximum": 99}, "price": money})
    lines: Schema = {"type": "array", "items": line, "minItems": 1, "maxItems": 3}
    step_ = record({"step": SHORT, "minutes": {"type": "integer", "minimum": 0, "maximum": 240}})
    return [
        record({"label": {"enum": ["ham", "spam"]}, "reason": TEXT}),
        record({"title": TEXT, "day": date, "guests": {"type": "array", "items": SHORT, "maxItems": 4}}),
        record({"customer": SHORT, "lines": lines, "total": money}),
        record(
            {"number": {"type": "string", "pattern": "^INV-[0-9]{6}$"}, "date": date, "to": address, "lines": lines}
        ),
        record(
            {
                "name": TEXT,
                "serves": {"type": "integer", "minimum": 1, "maximum": 12},
                "steps": {"type": "array", "items": step_, "minItems": 1, "maxItems": 5},
                "diet": {"anyOf": [{"enum": ["vegan", "vegetarian"]}, {"type": "null"}]},
            }
        ),
    ][step]


KINDS: list[Callable[[int], Schema]] = [
    flat,
    nested,
    lists,
    choices,
    numbers,
    patterns,
    unions,
    recursive,
    optional,
    whole,
]
SCHEMAS: dict[str, Schema] = {f"{kind.__name__} {step + 1}": kind(step) for step in range(5) for kind in KINDS}

REFUSED: dict[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "uniqueItems": {"type": "array", "items": COUNT, "uniqueItems": True},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
}
"""What is not kept, and has to be refused by this name."""
