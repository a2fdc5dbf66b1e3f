"""Tools in OpenAI's shapes: what is offered, what has to be called, what was."""

from __future__ import annotations

import json
import secrets
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


class ToolFields(pydantic.BaseModel):
    """What a chat may say of tools."""

    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | None = None
    """Absent: `auto` where there are tools."""
    parallel_tool_calls: bool | None = None
    """False: at most one call. Absent or true: several are possible."""

    @pydantic.model_validator(mode="after")
    def _tools_agree(self) -> ToolFields:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise RequestError("two of 'tools' have the same name", param="tools")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise RequestError("'tool_choice' asks for a call, and there are no 'tools'", param="tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            reason = f"'tool_choice' names '{self.tool_choice.function.name}', which is none of 'tools'"
            raise RequestError(reason, param="tool_choice")
        return self

    @property
    def offered(self) -> list[Function]:
        """Functions that may be called."""
        if self.tool_choice == "none":
            return []
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            wanted = self.tool_choice.function.name
            return [function for function in functions if function.name == wanted]
        return functions

    @property
    def must_call(self) -> bool:
        """Whether an answer is nothing but calls."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def told(self) -> str | None:
        """What the model is told of its tools; None: it has none."""
        listed = (
            {
                "name": function.name,
                **({} if function.description is None else {"description": function.description}),
                "parameters": function.parameters or NOTHING,
            }
            for function in self.offered
        )
        return tool_calls.prompt(listed, self.must_call) if self.offered else None

    @property
    def calls_grammar(self) -> str:
        """What an answer has to be where there are tools. Raises RequestError: a schema that is not kept here."""
        places = {tool.function.name: number for number, tool in enumerate(self.tools or ())}
        tools = [
            (
                function.name,
                function.parameters or NOTHING,
                f"tools[{places[function.name]}].function.parameters",
            )
            for function in self.offered
        ]
        several = self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)
        return grammar.of_calls(tools, text=not self.must_call, several=several, param="tools")


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
        try:
            json.loads(arguments)
        except ValueError:
            raise RequestError(f"'{here}.function.arguments' is no JSON", param=f"{here}.function.arguments") from None
        texts.append(tool_calls.written(name, arguments))
        ids.append(call["id"])
    return "\n".join(texts), ids
