"""Schemas, patterns and grammars that want to cost much, or to end who reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from steelyard.text import grammar

Read = Callable[[], str]
SIZES = (10, 100, 1_000, 3_000)


def nested(depth: int, around: Callable[[Any], Any], inner: Any) -> Any:
    """`inner` in so many layers."""
    for _ in range(depth):
        inner = around(inner)
    return inner


def schemas() -> Iterator[tuple[str, Any]]:
    """By name."""
    layers: dict[str, Callable[[Any], Any]] = {
        "properties": lambda inner: {"type": "object", "properties": {"a": inner}},
        "items": lambda inner: {"type": "array", "items": inner},
        "anyOf": lambda inner: {"anyOf": [inner, {"type": "null"}]},
        "allOf": lambda inner: {"allOf": [inner]},
        "prefixItems": lambda inner: {"type": "array", "prefixItems": [inner]},
        "additionalProperties": lambda inner: {"type": "object", "additionalProperties": inner},
    }
    for (name, layer), size in ((each, size) for each in layers.items() for size in (*SIZES[:3], 20_000)):
        yield f"{name} {size} deep", nested(size, layer, {"type": "string"})
    yield "anyOf doubles", nested(12, lambda inner: {"anyOf": [inner, inner]}, {"type": "string", "pattern": "a{1,50}"})
    yield "allOf doubles", nested(12, lambda inner: {"allOf": [inner, inner]}, {"type": "string"})
    for size in SIZES:
        properties = {f"name {number}": {"type": "string"} for number in range(size)}
        yield f"{size} properties", {"type": "object", "properties": properties, "required": list(properties)}
        yield f"{size} optional", {"type": "object", "properties": properties, "additionalProperties": False}
        yield f"enum of {size}", {"enum": [f"value {number}" for number in range(size)]}
        yield f"anyOf {size}", {"anyOf": [{"type": "object", "properties": {"a": {"const": n}}} for n in range(size)]}
        yield f"{size} at least", {"type": "array", "items": {"type": "integer"}, "minItems": size * size}
        yield f"{size} signs", {"type": "string", "minLength": size * size, "maxLength": size * size * 10}
        yield (
            f"a range of {size}",
            {"type": "number", "minimum": -(10.0**size) if size < 300 else -1e300, "maximum": 1e300},
        )
        yield f"a multiple of {size}", {"type": "number", "multipleOf": size + 1 / size}
        yield f"a pattern's {size}", {"type": "string", "pattern": f"^(a|b|ab){{{size}}}$"}
        yield f"{size} patterns", {"patternProperties": {f"^a{{{n}}}b*$": {"type": "string"} for n in range(1, size)}}
        yield f"a constant of {size}", {"const": "x" * size * 30}
    yield "itself", {"$ref": "#"}
    yield (
        "two that name each other",
        {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        },
    )
    yield (
        "many that name all",
        {
            "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{m}"} for m in range(30)]} for n in range(30)},
            "$ref": "#/$defs/d0",
        },
    )
    yield "not a schema", {"type": "nothing"}
    yield "a library's own field", {"type": "object", "x-guidance": {"max_items": 10**12, "coerce_one_of": "yes"}}
    yield "a wild number", {"type": "integer", "minimum": -(10**400), "maximum": 10**400}


def patterns() -> Iterator[tuple[str, str]]:
    """By name."""
    for size in SIZES:
        yield f"{size} parentheses", "(" * size + "a" + ")" * size
        yield f"{size} stars", "(" * size + "a" + "*)" * size
        yield f"{size} times {size}", f"(a{{1,{size}}}){{1,{size}}}"
        yield f"{size} ways", "|".join(f"{'ab' * (n % 40)}[0-9]+{n}" for n in range(size))
        yield f"any {size} then", f"(a|b)*a(a|b){{{size}}}"
        yield f"{size} optional", "a?" * size + "a" * size
        yield f"{size} of any letter", rf"\w{{{size}}}"
        yield f"{size} not", "[^a]" * size
        yield f"{size} and", "&".join([f".*{n}.*" for n in range(min(size, 1000))])
    yield "half open", "(((((("
    yield "looks ahead", "(?=a)(?!b).*"
    yield "refers back", r"(a)\1"
    yield "is empty", ""
    yield "has a broken class", "[z-a]"
    yield "counts wildly", "a{99999999999}"


def rules() -> Iterator[tuple[str, str]]:
    """By name."""
    for size in SIZES:
        yield f"{size} groups", "start: " + "(" * size + '"a"' + ")" * size
        yield (
            f"{size} after each other",
            "\n".join(["start: r0", *(f"r{n}: r{n + 1}" for n in range(size)), f'r{size}: "a"']),
        )
        yield (
            f"{size} terminals within",
            "\n".join(
                ["start: T0", *(f"T{n}: T{n + 1} T{n + 1}" for n in range(min(size, 200))), f'T{min(size, 200)}: "a"']
            ),
        )
        yield f"{size} stars of rules", "start: " + "(" * size + '"a"' + ")*" * size
    yield "ambiguous", 'start: s\ns: s s | s s s | "a" |'
    yield "no start", 'begin: "a"'
    yield "left and right", "start: start start | start"
    yield "a schema inside", 'start: %json { "type": "object", "$ref": "#" }'
    yield "a pattern inside", "start: /(a{1,1000}){1,1000}/"
    yield "limits of its own", '%llguidance {"no_forcing": true, "allow_initial_skip": true}\nstart: "a"'
    yield "signs", "start: \x00\x01 | \ud83d"


def payloads() -> Iterator[tuple[str, Read]]:
    """All of them: what reads one, by name."""
    for name, schema in schemas():
        yield f"schema: {name}", functools.partial(grammar.of_schema, schema, "given")
    for name, pattern in patterns():
        yield f"pattern: {name}", functools.partial(grammar.of_pattern, pattern, "given")
    for name, text in rules():
        yield f"rules: {name}", functools.partial(grammar.of_rules, text, "given")
