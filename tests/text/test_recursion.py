"""Recursive schemas written out to a depth: what they leave is valid by the schema itself, and comes to an end."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from steelyard.errors import RequestError
from steelyard.text import grammar
from steelyard.text.recursion import DEPTH, unroll
from steelyard.text.tokenizer import Tokenizer

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}
BIT: Schema = {"enum": [0, 1]}


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer_folder: Path) -> LLTokenizer:
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)
    return LLTokenizer(tokenizer.serialized, n_vocab=tokenizer.vocabulary, eos_token=sorted(tokenizer.eos_ids))


def record(**properties: Any) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def said(rules: str, vocabulary: LLTokenizer, draw: random.Random, likes: str = "", most: int = 3000) -> str | None:
    """A random answer, which goes on with what it likes wherever it may; None: it has not ended by so many tokens."""
    matcher = LLMatcher(vocabulary, rules, log_level=0)
    liked = [vocabulary.tokenize_str(text)[0] for text in likes]
    tokens: list[int] = []
    while len(tokens) < most:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        token = next((one for one in liked if bits[one]), None) if liked else None
        token = draw.choice(allowed) if token is None else token
        if token == vocabulary.eos_token:
            return vocabulary.decode_str(tokens)
        assert matcher.consume_token(token)
        tokens.append(token)
        if matcher.is_stopped():
            return vocabulary.decode_str(tokens)
    return None


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (1 if isinstance(value, dict) else 0) + max(map(depth, inner), default=0)


def check(schema: Schema, vocabulary: LLTokenizer, most: int = DEPTH, **options: Any) -> list[Any]:
    """Answers, all valid, and at most so deep though half of them go deeper wherever they may."""
    rules = grammar.of_schema(schema, "schema", **options)
    texts = [said(rules, vocabulary, random.Random(seed), '"{[' if seed % 2 else "") for seed in range(6)]
    rows = [json.loads(text) for text in texts if text is not None]
    assert all(text is not None for text in texts[1::2])
    for row in rows:
        jsonschema.Draft202012Validator(schema).validate(row)
    assert max(map(depth, rows)) == most
    return rows


OR_NONE: Schema = {"anyOf": [{"$ref": "#/$defs/node"}, NULL]}
LIST = {"$ref": "#/$defs/node", "$defs": {"node": record(value=BIT, next=OR_NONE)}}
RECURSIVE: dict[str, Schema] = {
    "a list": LIST,
    "definitions": {
        "$ref": "#/definitions/node",
        "definitions": {"node": record(next={"anyOf": [{"$ref": "#/definitions/node"}, NULL]})},
    },
    "the whole": record(next={"anyOf": [{"$ref": "#"}, NULL]}),
    "an array": record(all={"type": "array", "items": {"$ref": "#"}, "maxItems": 2}),
    "places": record(
        all={"type": "array", "prefixItems": [BIT, {"anyOf": [{"$ref": "#"}, NULL]}], "minItems": 2, "maxItems": 2}
    ),
    "absent": {**record(value=BIT, next={"$ref": "#"}), "required": ["value"]},
    "signs": {
        "$ref": "#/$defs/a~1b%20c",
        "$defs": {"a/b c": record(n={"anyOf": [{"$ref": "#/$defs/a~1b%20c"}, NULL]})},
    },
    "others": {"type": "object", "additionalProperties": {"$ref": "#"}, "maxProperties": 2},
    "named by pattern": {
        "type": "object",
        "patternProperties": {"^[xy]$": {"$ref": "#"}},
        "additionalProperties": False,
    },
    "all of": {**record(next={"allOf": [{"$ref": "#"}]}), "required": []},
    "one of": {
        "oneOf": [record(kind={"const": "leaf"}), record(kind={"const": "branch"}, below={"$ref": "#"})],
    },
    "beside its type": record(next={"anyOf": [{"$ref": "#"}, NULL], "type": ["object", "null"]}),
}


@pytest.mark.parametrize("name", RECURSIVE)
def test_answers_are_so_deep_and_valid(name: str, vocabulary: LLTokenizer) -> None:
    assert check(RECURSIVE[name], vocabulary)


def test_each_of_two_that_name_each_other_stands_so_often(vocabulary: LLTokenizer) -> None:
    defs = {
        "leaf": record(branch={"anyOf": [{"$ref": "#/$defs/branch"}, NULL]}),
        "branch": record(leaf={"$ref": "#/$defs/leaf"}),
    }
    check({"$ref": "#/$defs/leaf", "$defs": defs}, vocabulary, most=2 * DEPTH - 1)


@pytest.mark.parametrize("most", [1, 2, 9])
def test_the_depth_is_said(most: int, vocabulary: LLTokenizer) -> None:
    check(LIST, vocabulary, most=most, depth=most)


def test_part_of_a_property(vocabulary: LLTokenizer) -> None:
    """A definition that stands in its place as well: once there, and so often where it is named."""
    tree = record(leaf=BIT, below={"type": "array", "items": {"$ref": "#/properties/tree"}, "maxItems": 1})
    check(record(tree=tree), vocabulary, most=2 + DEPTH)


def test_what_is_not_recursive_is_left_alone() -> None:
    shared = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/b"}}}
    for schema in (
        {},
        {**shared, "$defs": {"b": {"type": "array", "items": {"$ref": "#/$defs/c"}}, "c": BIT}},
        {**shared, "$defs": {"b": BIT, "unused": {"items": {"$ref": "#/$defs/unused"}}}},
        {"const": {"$ref": "#"}, "default": {"$ref": "#"}, "title": "$ref"},
        {"properties": {"$ref": {"type": "string"}}},
    ):
        assert unroll(schema, "schema") is schema


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"$ref": "https://elsewhere.example/x"}, "by their place"),
        ({"items": {"$ref": "json-schema:///#/$defs/a"}, "$defs": {"a": {}}}, "by their place"),
        ({"items": {"$ref": "#a"}, "$defs": {"x": {"$anchor": "a"}}}, "by their place"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"$id": "http://a.b/x"}}}, "by their place"),
        ({"properties": {"const": {"$ref": "x"}}, "enum": [{"$id": "x"}]}, "by their place"),
        ({"$dynamicRef": "#x"}, "by their place"),
        ({"items": {"$ref": "#/$defs/none"}}, "not within it"),
    ],
)
def test_parts_are_named_by_their_place_alone(schema: Schema, complaint: str) -> None:
    """Whatever another reader could find under another name, or elsewhere, was never looked at here."""
    with pytest.raises(RequestError, match=complaint):
        grammar.of_schema(schema, "schema")


def test_a_schemas_own_name_says_nothing() -> None:
    named = {"$id": "https://a.b/c", "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "integer"}
    bare = {key: value for key, value in named.items() if key != "$id"}
    assert grammar.of_schema(named, "schema") == grammar.of_schema(bare, "schema")
    assert grammar.of_schema({"properties": {"$id": {"type": "string"}, "id": {"const": "x"}}}, "schema")


def test_what_has_no_end_is_refused() -> None:
    for schema in (
        record(next={"$ref": "#"}),
        {"$ref": "#"},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
        {"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1},
        {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["other"]},
        {"anyOf": [record(a={"$ref": "#"}), record(b={"$ref": "#"})]},
        {"allOf": [record(a={"$ref": "#"})]},
    ):
        with pytest.raises(RequestError, match=r"'schema' is recursive and has no answer .* at most 5 times"):
            grammar.of_schema(schema, "schema")


def test_types_that_are_left(vocabulary: LLTokenizer) -> None:
    """Where an object would have no end, what is no object may stand."""
    schema = {**record(next={"$ref": "#"}), "type": ["object", "boolean"]}
    check(schema, vocabulary, most=DEPTH - 1)


def test_the_hostile_are_bounded() -> None:
    """Every definition names every other; thousands in a row; more than a grammar may have: soon done, or refused."""
    all_ = {"type": "array", "items": {"anyOf": [{"$ref": f"#/$defs/{number}"} for number in range(30)]}}
    crowd = {"$ref": "#/$defs/0", "$defs": {str(number): all_ for number in range(30)}}
    row = {str(number): {"type": "array", "items": {"$ref": f"#/$defs/{(number + 1) % 800}"}} for number in range(800)}
    wide = {"type": "array", "items": {"$ref": "#"}, "prefixItems": [{"enum": ["x" * 40]}] * 1200}
    nested: Schema = {"type": "array", "items": {"$ref": "#"}}
    for _ in range(60):
        nested = {"type": "object", "properties": {"a": nested}}
    long = {str(number): {"items": {"$ref": f"#/$defs/{number + 1}"}} for number in range(1600)}
    pointers = [{"$ref": "#" + "/properties/a" * number} for number in range(61)]
    rows = [{"$ref": "#/$defs/0", "$defs": row}, {"$ref": "#/$defs/0", "$defs": {**long, "1600": {}}}]
    for schema in (crowd, *rows, wide, {**nested, "anyOf": pointers}):
        started = time.monotonic()
        with suppress(RequestError):
            assert len(grammar.of_schema(schema, "schema")) <= grammar.MOST_WRITTEN_OUT
        assert time.monotonic() - started < 10
    for schema in rows:
        with pytest.raises(RequestError, match="'schema' has more than 500 schemas within each other"):
            unroll(schema, "schema")
    with pytest.raises(RequestError, match="'schema' has more than 50000 parts"):
        unroll({"prefixItems": [{}] * 9_999, "items": {"$ref": "#"}}, "schema")


class Schemas:
    """Random schemas, recursive in most ways."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def whole(self) -> Schema:
        defs = {name: self.inner(3, named=False) for name in "ab"}
        root = {**self.object_(3), "$defs": defs, "definitions": {"c": self.inner(2, named=False)}}
        root["properties"] |= {"p": self.inner(2, named=False)}
        return root

    def inner(self, levels: int, *, named: bool = True) -> Schema:
        """Not `named`: no reference outside of a property or an item, where nothing would ever be said."""
        kinds = ["leaf", "object", "array", "union", "both"] if levels else ["leaf"]
        kind = self.draw.choice([*kinds, *["reference"] * (4 if named else 0)])
        if kind == "reference":
            places = ["#", "#/$defs/a", "#/$defs/b", "#/definitions/c", "#/properties/p"]
            return {"$ref": self.draw.choice(places)}
        if kind == "object":
            return self.object_(levels)
        if kind == "array":
            return self.array(levels)
        if kind == "union":
            options = [self.inner(levels - 1, named=named) for _ in range(self.draw.randint(1, 3))]
            return {"anyOf": options}
        if kind == "both":
            return {"allOf": [self.inner(levels - 1, named=named) for _ in range(self.draw.randint(1, 2))]}
        return self.draw.choice([NULL, BIT, {"type": "boolean"}, {"type": "string", "maxLength": 2}])

    def object_(self, levels: int) -> Schema:
        names = self.draw.sample("pqrs", self.draw.randint(0, 3))
        made: Schema = {"properties": {name: self.inner(levels - 1) for name in names}}
        made["required"] = [name for name in names if self.draw.random() < 0.4]
        made["type"] = self.draw.choice(["object", "object", ["object", "null"]])
        made["additionalProperties"] = self.inner(levels - 1) if self.draw.random() < 0.2 else False
        if self.draw.random() < 0.1:
            made["patternProperties"] = {"^z": self.inner(levels - 1)}
        return made

    def array(self, levels: int) -> Schema:
        made: Schema = {"type": "array", "maxItems": self.draw.randint(0, 2)}
        if self.draw.random() < 0.8:
            made["items"] = self.inner(levels - 1)
        else:
            made["items"] = False
        if self.draw.random() < 0.3:
            made["prefixItems"] = [self.inner(levels - 1) for _ in range(self.draw.randint(1, 2))]
        if self.draw.random() < 0.3:
            made["minItems"] = 1
        return made


def circular(schema: Schema) -> bool:
    """Whether following references from a written out schema leads back."""
    names = {name: set(_named(body)) for name, body in schema["$defs"].items()}
    while ends := {name for name, others in names.items() if not others & names.keys()}:
        names = {name: others for name, others in names.items() if name not in ends}
    return bool(names)


def _named(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for one in value for name in _named(one)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"].removeprefix("#/$defs/")] if isinstance(value.get("$ref"), str) else []
    return own + [name for one in value.values() for name in _named(one)]


def test_random_schemas(vocabulary: LLTokenizer) -> None:
    """What is written out is not circular, and whatever it lets pass the schema itself does."""
    recursive = answers = 0
    for seed in range(300):
        schema = Schemas(seed).whole()
        try:
            flat = unroll(schema, "schema", 3)
            if flat is schema:
                continue
            assert not circular(flat), seed
            rules = grammar.of_schema(schema, "schema", 3)
        except RequestError:
            continue
        recursive += 1
        validator = jsonschema.Draft202012Validator(schema)
        for turn in range(4):
            text = said(rules, vocabulary, random.Random(turn), most=400)
            if text is not None:
                answers += 1
                assert validator.is_valid(json.loads(text)), (seed, text)
    assert recursive > 50
    assert answers > 150


def test_calls_of_tools_are_so_deep(vocabulary: LLTokenizer) -> None:
    tools = [("note", {**record(next={"anyOf": [{"$ref": "#"}, NULL]}), "description": "a note"}, "tools[0]")]
    rules = grammar.of_calls(tools, text=False, several=False, param="tools")
    text = said(rules, vocabulary, random.Random(0), "{")
    assert text is not None
    assert text.count('"next"') == DEPTH


def test_what_is_no_schema_is_left_to_the_library() -> None:
    """Wrong things at every keyword beside a recursive one: refused, or as the library has it."""
    wrong: list[Any] = [None, 1, "x", [], [1], [[]], {}, {"a": 1}, True]
    for keyword in ("type", "required", "properties", "patternProperties", "items", "prefixItems", "anyOf", "allOf"):
        for value in [*wrong, "²", "9" * 5000]:
            for schema in (
                {"additionalProperties": {"$ref": "#"}, "minProperties": value, keyword: value},
                {"anyOf": [{"$ref": f"#/anyOf/{value}"}, {"$ref": "#"}, {"minItems": value, keyword: value}]},
                {"items": {"$ref": "#"}, "minItems": value, "$ref": value, "$id": value, "$anchor": value},
            ):
                with suppress(RequestError):
                    grammar.of_schema(schema, "schema")
