"""`response_format` and `structured_outputs`: what an answer has to be, in OpenAI's words and in vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.serve.protocol.fields import Fields
from steelyard.text import grammar
from steelyard.text.recursion import DEPTH

MAX_SCHEMA_NAME = 64
MAX_DEPTH = 64
CHOICE = Annotated[str, Field(min_length=1, max_length=1000)]


class JsonSchema(Fields):
    """A schema by name."""

    stored = False
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$", max_length=MAX_SCHEMA_NAME)]
    description: None = None
    """Refused at anything else: the model is not told of it. Say it in a message."""
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Accepted either way: an answer is always what the schema says."""


class ResponseFormat(Fields):
    """Plain text, JSON, or JSON of a schema."""

    stored = False
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @pydantic.model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            reason = "is needed by type json_schema, and means nothing to others"
            raise RequestError(f"'response_format.json_schema' {reason}", param="response_format.json_schema")
        return self

    @property
    def grammar(self) -> str | None:
        """As an engine compiles it; None: any text. Raises RequestError: what of the schema is not kept here."""
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.json_schema is None else self.json_schema.schema_ or {"type": "object"}
        return grammar.of_schema(
            schema, "response_format.json_schema.schema" if self.json_schema else "response_format"
        )


class StructuredOutputs(Fields):
    """One of these."""

    stored = False
    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[CHOICE], Field(min_length=1, max_length=1024)] | None = None
    grammar_: Annotated[str | None, Field(alias="grammar", min_length=1)] = None
    """Lark's rules, from `start` on."""
    json_object: Literal[True] | None = None
    depth: Annotated[int, Field(ge=2, le=MAX_DEPTH)] | None = None
    """How often a definition of a recursive schema may stand within itself; only beside `json`."""

    @pydantic.model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        asked = (self.json_, self.regex, self.choice, self.grammar_, self.json_object)
        if sum(one is not None for one in asked) != 1:
            raise RequestError(
                "'structured_outputs' has one of json, regex, choice, grammar and json_object",
                param="structured_outputs",
            )
        if self.depth is not None and self.json_ is None:
            reason = "says how deep an answer to 'structured_outputs.json' may be"
            raise RequestError(f"'structured_outputs.depth' {reason}", param="structured_outputs.depth")
        return self

    @property
    def grammar(self) -> str:
        """As an engine compiles it. Raises RequestError: what of it is not kept here."""
        if self.regex is not None:
            return grammar.of_pattern(self.regex, "structured_outputs.regex")
        if self.choice is not None:
            return grammar.of_choice(self.choice, "structured_outputs.choice")
        if self.grammar_ is not None:
            return grammar.of_rules(self.grammar_, "structured_outputs.grammar")
        schema = {"type": "object"} if self.json_ is None else self.json_
        return grammar.of_schema(schema, "structured_outputs.json", self.depth or DEPTH)
