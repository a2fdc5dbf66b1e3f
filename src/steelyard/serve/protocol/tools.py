"""Tools in OpenAI's shapes: what is offered, what has to be called, what was."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.serve.protocol.fields import Fields
from steelyard.text import grammar, tool_calls

MOST_TOOLS = 128
NAME = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$", max_length=64)]


class Function(Fields):
    """A function that a model may ask to be called."""

    stored = False
    name: NAME
    description: Annotated[str, Field(max_length=4096)] | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; absent: no arguments."""
    strict: bool | None = None
    """Accepted either way: arguments are always what the schema says."""


class Tool(Fields):
    """A function."""

    stored = False
    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    """One by its name."""

    stored = False
    name: NAME


class NamedTool(Fields):
    """The function that has to be called."""

    stored = False
    type: Literal["function"]
    function: NamedFunction


Choice = Literal["none", "auto", "required"] | NamedTool
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Offer:
    """Functions of a request, and which of them may or must be called."""

    functions: tuple[Function, ...]
    choice: Literal["none", "auto", "required"]
    named: str | None
    """The one that has to be called."""
    several: bool
    """Whether there may be more than one call."""
    path: str
    """Where the request has a function's parameters, by its number."""

    def check(self) -> None:
        """Raises RequestError: the functions and the choice do not go together."""
        names = [function.name for function in self.functions]
        if len(set(names)) < len(names):
            raise RequestError("two of 'tools' have the same name", param="tools")
        if not names and self.choice == "required":
            raise RequestError("'tool_choice' asks for a call, and there are no 'tools'", param="tool_choice")
        if self.named is not None and self.named not in names:
            raise RequestError(f"'tool_choice' names '{self.named}', which is none of 'tools'", param="tool_choice")

    @property
    def offered(self) -> list[Function]:
        """Functions that may be called."""
        if self.choice == "none":
            return []
        return [function for function in self.functions if self.named in (None, function.name)]

    @property
    def must_call(self) -> bool:
        """Whether an answer is nothing but calls."""
        return self.choice == "required"

    @property
    def described(self) -> list[dict[str, Any]]:
        """What a model is told of each of its tools."""
        return [
            {
                "name": function.name,
                **({} if function.description is None else {"description": function.description}),
                "parameters": function.parameters or NOTHING,
            }
            for function in self.offered
        ]

    @property
    def told(self) -> str:
        """The same as text of a system message, for templates that know no tools."""
        return tool_calls.prompt(iter(self.described), self.must_call)

    @property
    def grammar(self) -> str:
        """What an answer has to be where there are tools. Raises RequestError: a schema that is not kept here."""
        places = {function.name: number for number, function in enumerate(self.functions)}
        tools = [
            (function.name, function.parameters or NOTHING, self.path.format(places[function.name]))
            for function in self.offered
        ]
        several = self.several and self.named is None
        return grammar.of_calls(tools, text=not self.must_call, several=several, param="tools")


class ToolFields(pydantic.BaseModel):
    """What a chat may say of tools."""

    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | None = None
    """Absent: `auto` where there are tools."""
    parallel_tool_calls: bool | None = None
    """False: at most one call. Absent or true: several are possible."""

    @pydantic.model_validator(mode="after")
    def _tools_agree(self) -> ToolFields:
        self.offer.check()
        return self

    @property
    def offer(self) -> Offer:
        """What of them may be called, and how."""
        choice = self.tool_choice
        return Offer(
            tuple(tool.function for tool in self.tools or ()),
            "required" if isinstance(choice, NamedTool) else choice or "auto",
            choice.function.name if isinstance(choice, NamedTool) else None,
            self.parallel_tool_calls is not False,
            "tools[{}].function.parameters",
        )

    @property
    def offered(self) -> list[Function]:
        """Functions that may be called."""
        return self.offer.offered

    @property
    def calls_grammar(self) -> str:
        """What an answer has to be where there are tools. Raises RequestError: a schema that is not kept here."""
        return self.offer.grammar


class CalledFunction(msgspec.Struct, frozen=True):
    """What was called."""

    name: str
    arguments: str
    """JSON."""


class ToolCall(msgspec.Struct, frozen=True):
    """A call that a model asks for."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class FunctionDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call that begins, or more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta = FunctionDelta()


def call_id() -> str:
    """A fresh one."""
    return f"call_{secrets.token_hex(12)}"


def spoken(calls: object, path: str) -> tuple[str, list[str]]:
    """Calls that an assistant's message of a request has, as its model wrote them, and their ids.

    Raises:
        RequestError: they are none; the field is named.
    """
    if not isinstance(calls, list) or not 0 < len(calls) <= MOST_TOOLS:
        raise RequestError(f"'{path}' must be a list of 1 to {MOST_TOOLS} calls", param=path)
    texts, ids = [], []
    for number, call in enumerate(calls):
        here = f"{path}[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        given = function if isinstance(function, dict) else {}
        name, arguments = given.get("name"), given.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, str) or not isinstance(call.get("id"), str):
            raise RequestError(f"'{here}' must have an id, and a function with a name and arguments", param=here)
        check_arguments(arguments, f"{here}.function.arguments")
        texts.append(tool_calls.written(name, arguments))
        ids.append(call["id"])
    return "\n".join(texts), ids


def check_arguments(arguments: str, path: str) -> None:
    """Raises RequestError: a call's arguments are no JSON."""
    try:
        json.loads(arguments)
    except ValueError:
        raise RequestError(f"'{path}' is no JSON", param=path) from None
