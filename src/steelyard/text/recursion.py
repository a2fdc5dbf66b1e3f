"""JSON schemas whose definitions name themselves, written out to a depth, so that every answer comes to an end.

Each definition is written once a level, and names those a level below where it comes back to one that it stands in; so
what comes out grows by the depth alone. On the last level nothing comes back: a union takes another branch, an array
ends, an optional property is absent. Whatever this leaves is also what the schema itself allows.

Knows the keywords that hold schemas and no others; no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from steelyard.errors import RequestError
from steelyard.text.references import References

DEPTH = 5
"""How often a definition may stand within itself, the outermost counted, if nobody says."""
MOST_PARTS = 50_000
"""Schemas within a schema, those of every level counted: what the library that compiles them takes."""
MOST_NESTED = 500
"""Schemas within each other, through references: the library follows them on the stack, thousands end the process."""
TYPES = ("null", "boolean", "number", "string", "array", "object")
UNIONS = ("anyOf", "oneOf")
NAMED = ("properties", "patternProperties")
NUMBERED = ("allOf", "prefixItems", "items", "additionalItems", "additionalProperties")
"""Hold a schema or a list of them."""
BELOW = "#/$defs/"
OWN_NAMES = ("$id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")
RENAMES = (*OWN_NAMES, "$dynamicRef", "$recursiveRef")
LEFT_OUT = ("$defs", "definitions", "$id", "id", "$anchor", "$schema")
"""What a definition's copy does not have."""


def unroll(schema: dict[str, Any], param: str, depth: int = DEPTH) -> dict[str, Any]:
    """A schema whose answers are at most so deep; itself where nothing is recursive.

    Args:
        schema: what it refers to has to be within it, if it is recursive.
        param: the field that it came from.
        depth: how often a definition may stand within itself, 1 at least.

    Raises:
        RequestError: no answer is that shallow, it grows too large, or it is recursive and names a part elsewhere.
    """
    schema = plain_names(schema, param)
    definitions = _Definitions(schema, param)
    definitions.check_names()
    if definitions.returns:
        return unroll(definitions.written_out(depth), param)
    definitions.check_nesting()
    return schema


def plain_names(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """A schema without a name of its own. Its parts have none: two readers would have to agree on what they lead to.

    Raises:
        RequestError: a part is renamed, or referred to otherwise than by its place, such as `#/$defs/x`.
    """
    bare = {key: value for key, value in schema.items() if not (key in OWN_NAMES and isinstance(value, str))}
    waiting: list[Any] = [bare]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            for key, value in one.items():
                renamed = key in RENAMES and isinstance(value, str | bool)
                if renamed or (key == "$ref" and isinstance(value, str) and value[:2] not in ("#", "#/")):
                    reason = f"has '{key}' of {str(value)[:60]!r}: refer to parts of it by their place, as '#/$defs/x'"
                    raise RequestError(f"'{param}' {reason}", param=param)
                waiting.append(value)
        elif isinstance(one, list):
            waiting += one
    return schema if len(bare) == len(schema) else bare


class _Definitions:
    """What a schema's references come to: the schema itself and all that are named, known by their identity."""

    def __init__(self, root: dict[str, Any], param: str) -> None:
        self._root, self._param = root, param
        self._names_what = References(root)
        self._unknown: str | None = None
        self._parts = 0
        self._reached: dict[int, list[tuple[dict[str, Any], int]]] = {}
        """Of each, what it names anywhere within, and how many schemas around that."""
        self._nested: dict[int, int] = {}
        """Of each, how many schemas are within each other, those that it names left out."""
        self._inner_first: list[dict[str, Any]] = []
        self.returns: set[tuple[int, int]] = set()
        """References to a definition in which they stand: from, to. Every circle has one."""
        self._follow_all()
        self._numbers = {id(body): number for number, body in enumerate(self._inner_first)}
        self._deep: set[int] = set()
        for body in self._inner_first:
            if any((id(body), id(to)) in self.returns or id(to) in self._deep for to, _ in self._reached[id(body)]):
                self._deep.add(id(body))
        self._written: dict[tuple[int, int], Any] = {}
        self._names: dict[str, tuple[int, int]] = {}

    def check_nesting(self) -> None:
        """Refuse what the library would follow too far, where nothing is recursive.

        Raises:
            RequestError: its definitions are too many within each other.
        """
        whole = dict[int, int]()
        for body in self._inner_first:
            through = max((around + whole[id(to)] for to, around in self._reached[id(body)]), default=0)
            whole[id(body)] = max(through, self._nested[id(body)])
        if whole[id(self._root)] > MOST_NESTED:
            reason = f"has more than {MOST_NESTED} schemas within each other, those that it names counted"
            raise RequestError(f"'{self._param}' {reason}", param=self._param)

    def check_names(self) -> None:
        """Refuse a reference that leads nowhere: another reader may find something there.

        Raises:
            RequestError: it is named.
        """
        if self._unknown is not None:
            reason = f"names '{self._unknown[:100]}', which is not within it: refer by '#/…'"
            raise RequestError(f"'{self._param}' {reason}", param=self._param)

    def written_out(self, depth: int) -> dict[str, Any]:
        """The schema with a definition for each that is reached, level by level."""
        for level in range(depth):
            for body in self._inner_first:
                if level == 0 or id(body) in self._deep:
                    self._written[id(body), level] = self._cut(body, body, level)
        whole = self._written[id(self._root), depth - 1]
        if whole is False:
            reason = f"has no answer in which its definitions stand within themselves at most {depth} times"
            raise RequestError(f"'{self._param}' is recursive and {reason}", param=self._param)
        reached: dict[str, Any] = {}
        waiting = [whole]
        while waiting:
            for name in _copies(waiting.pop()):
                if name not in reached:
                    reached[name] = self._written[self._names[name]]
                    waiting.append(reached[name])
        head = {"$schema": self._root["$schema"]} if "$schema" in self._root else {}
        return {**head, **whole, "$defs": reached}

    def _follow_all(self) -> None:
        """Depth first, without recursion: definitions may name each other in long rows."""
        standing_in = {id(self._root)}
        stack = [(self._root, iter(self._references(self._root)))]
        while stack:
            body, references = stack[-1]
            for to, _ in references:
                if id(to) in standing_in:
                    self.returns.add((id(body), id(to)))
                elif id(to) not in self._reached:
                    standing_in.add(id(to))
                    stack.append((to, iter(self._references(to))))
                    break
            else:
                stack.pop()
                standing_in.remove(id(body))
                self._inner_first.append(body)

    def _references(self, body: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
        found = self._reached[id(body)] = []
        waiting: list[tuple[Any, int]] = [(body, 1)]
        while waiting:
            schema, around = waiting.pop()
            if not isinstance(schema, dict):
                continue
            self._count()
            self._nested[id(body)] = max(self._nested.get(id(body), 0), around)
            if isinstance(schema.get("$ref"), str):
                to = self._names_what.lead(schema)
                if isinstance(to, dict):
                    found.append((to, around))
                elif not isinstance(to, bool):
                    self._unknown = schema["$ref"]
            waiting += [(part, around + 1) for part in reversed(list(_parts(schema)))]
        return found

    def _cut(self, schema: Any, within: dict[str, Any], level: int) -> Any:
        """A schema on a level of the definition that it is within; False: nothing is left of it."""
        if not isinstance(schema, dict):
            return schema
        self._count()
        cut: dict[str, Any] = {}
        for keyword, value in schema.items():
            made: Any
            if keyword in LEFT_OUT:
                continue
            if keyword == "$ref" and isinstance(value, str):
                made = self._below(schema, within, level)
                if made is True:
                    continue
            elif keyword in UNIONS and isinstance(value, list):
                made = [one for part in value if (one := self._cut(part, within, level)) is not False] or False
            elif keyword in NAMED and isinstance(value, dict):
                made = {name: self._cut(part, within, level) for name, part in value.items()}
            elif keyword in NUMBERED and isinstance(value, list):
                made = [self._cut(part, within, level) for part in value]
            elif keyword in NUMBERED:
                made = self._cut(value, within, level)
            else:
                made = value
            if made is False and keyword in ("$ref", *UNIONS):
                return False
            if keyword == "allOf" and isinstance(made, list) and any(one is False for one in made):
                return False
            cut[keyword] = made
        return _with_what_is_left(schema, cut)

    def _below(self, schema: dict[str, Any], within: dict[str, Any], level: int) -> str | bool:
        """The name of the copy that a schema's reference means here; False: there is none; True: it says nothing."""
        to = self._names_what.lead(schema)
        if isinstance(to, bool):
            return to
        level = level - 1 if (id(within), id(to)) in self.returns else level
        level = level if id(to) in self._deep else 0
        if level < 0 or self._written[id(to), level] is False:
            return False
        known = re.sub("[^a-zA-Z0-9]", "_", schema["$ref"].rpartition("/")[2])
        name = f"{known}-{self._numbers[id(to)]}-{level}"
        self._names[name] = id(to), level
        return BELOW + name

    def _count(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            reason = f"has more than {MOST_PARTS} parts when its definitions are written out"
            raise RequestError(f"'{self._param}' {reason}", param=self._param)


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas right within one, in order."""
    for keyword, value in schema.items():
        if keyword in NAMED and isinstance(value, dict):
            yield from value.values()
        elif keyword in UNIONS or keyword in NUMBERED:
            yield from value if isinstance(value, list) else (value,)


def _copies(schema: Any) -> Iterator[str]:
    """The names of the copies that a written one holds."""
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if isinstance(one.get("$ref"), str):
                yield one["$ref"].removeprefix(BELOW)
            waiting += _parts(one)


def _with_what_is_left(schema: dict[str, Any], cut: dict[str, Any]) -> dict[str, Any] | bool:
    """A cut schema whose types are those that still have values; False: none has."""
    gone = {"object"} if _no_object(schema, cut) else set()
    most = _most_items(cut)
    if most is not None:
        cut["maxItems"] = most
        if _number(cut.get("minItems"), 0) > most:
            gone.add("array")
    if not gone:
        return cut
    types: Any = schema.get("type", TYPES)
    left = [one for one in (types if isinstance(types, list | tuple) else [types]) if str(one) not in gone]
    return {**cut, "type": left} if left else False


def _no_object(schema: dict[str, Any], cut: dict[str, Any]) -> bool:
    """Whether a property that has to be there can not be."""
    own, patterns = _mapping(cut.get("properties")), _mapping(cut.get("patternProperties"))
    others = cut.get("additionalProperties")
    lost = others is False and schema["additionalProperties"] is not False
    for pattern, value in patterns.items():
        lost = lost or (value is False and schema["patternProperties"][pattern] is not False)
    required = cut.get("required")
    for name in required if isinstance(required, list) else ():
        if own.get(str(name), not lost) is False:
            return True
    few = others is False and all(value is False for value in patterns.values())
    return few and _number(cut.get("minProperties"), 0) > sum(value is not False for value in own.values())


def _most_items(cut: dict[str, Any]) -> int | None:
    """How many items an array can have; None: what is said. Takes off places that can not be filled."""
    first, rest = ("items", "additionalItems") if isinstance(cut.get("items"), list) else ("prefixItems", "items")
    given: Any = cut.get(first)
    places = given if isinstance(given, list) else []
    most = next((number for number, one in enumerate(places) if one is False), None)
    if most is not None:
        cut[first] = places[:most]
    elif cut.get(rest) is False:
        most = len(places)
    return None if most is None else min(most, _number(cut.get("maxItems"), most))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise
