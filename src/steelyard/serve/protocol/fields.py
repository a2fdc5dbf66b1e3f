"""A request body to a checked request: every field is honoured, or accepted at its neutral value, or refused by name.

Knows JSON, fields and values; nothing of models, tokens or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
import pydantic_core
from pydantic import Field
from pydantic_core import ErrorDetails

from steelyard.errors import RequestError

MAX_REPR = 80

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's, not had here yet. `null` is neutral for every field.
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # of no tools
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # of no tools
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # vLLM's.
    "bad_words": ([],),
    "min_tokens": (0,),
    "repetition_penalty": (1, 1.0),
    "stop_token_ids": ([],),
    # Ours.
    "explain": (False,),
}
"""Fields that are accepted at these values, where nothing is to be done for them, and refused by name at any other."""

Body = TypeVar("Body", bound="Fields")

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
"""Pairs that something is found by."""


BOUNDS = {
    "too_short": "hold at least {min_length}, not {length}",
    "too_long": "hold at most {max_length}, not {length}",
    "string_too_short": "be at least {min_length} long",
    "string_too_long": "be at most {max_length} long",
    "string_pattern_mismatch": "match {pattern}",
}
"""What is said of kinds of errors whose own words are those of a library."""


class Fields(pydantic.BaseModel):
    """A JSON object whose fields are all known; bools are no numbers and numbers are finite."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    stored: ClassVar[bool] = True
    """Whether its texts may come to the database, so that none may have the character NUL."""
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL
    """Fields that are not honoured, and the values at which they are accepted all the same."""


def neutral_properties(neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """How fields are described that are accepted at some values only."""
    return {name: {"enum": [None, *values]} for name, values in neutral.items()}


def describe_neutral(schema: dict[str, Any], kind: type[Fields]) -> None:
    """Add a kind's neutral fields to its schema: its `json_schema_extra`."""
    schema["properties"] = {**neutral_properties(kind.neutral), **schema["properties"]}


def parse(kind: type[Body], content: bytes) -> Body:
    """A request of type `kind` from the bytes of a body.

    Raises:
        RequestError: it is no JSON object, or a field is missing, unknown, of another type, out of range or not
            supported at this value; `param` names it.
    """
    try:
        body = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        wrong = "is nested too deeply" if "recursion limit" in str(error) else f"is not JSON: {error}"
        raise RequestError(f"the body {wrong}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    if kind.stored and b"\\u0000" in content and (path := _nul_in(body)) is not None:
        raise RequestError(f"'{path}' has the character NUL: remove it", param=path, code="invalid_value")
    honoured = accept_neutral(body, kind.neutral, kind.model_fields.keys())
    try:
        return kind.model_validate(honoured)
    except pydantic.ValidationError as error:
        raise _explained(error, body) from None


def accept_neutral(
    given: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]], honoured: Any, prefix: str = ""
) -> dict[str, Any]:
    """The fields of `given` that are honoured, once the others are found to be neutral.

    Args:
        given: a JSON object of the request.
        neutral: the values at which a field may be ignored, since they ask for nothing.
        honoured: names of the fields that are honoured.
        prefix: path of the object within the request, such as `messages[0].`.

    Raises:
        RequestError: a field is unknown, or not at a neutral value.
    """
    kept: dict[str, Any] = {}
    for name, value in given.items():
        if name in honoured:
            kept[name] = value
        elif name not in neutral:
            path = prefix + name[:MAX_REPR]
            raise RequestError(f"unknown field '{path}': remove it", param=path, code="unknown_parameter")
        elif value is not None and not any(type(value) is type(one) and value == one for one in neutral[name]):
            path = prefix + name
            raise RequestError(
                f"'{path}' is not supported here at {show(value)}: remove it", param=path, code="unsupported_parameter"
            )
    return kept


def _explained(error: pydantic.ValidationError, body: object) -> RequestError:
    first = _telling(error.errors(include_url=False), body)
    path = _path(first["loc"], body, missing=first["type"] == "missing")
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field '{path}': remove it", param=path, code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(f"'{path}' is missing", param=path, code="missing_required_parameter")
    if (bound := BOUNDS.get(first["type"])) is not None:
        told = bound.format(**first["ctx"], length=len(first["input"]))
        return RequestError(f"'{path}' must {told}", param=path, code="invalid_value")
    reason = first["msg"].removeprefix("Input should be ")
    return RequestError(f"'{path}' must be {reason}, not {show(first['input'])}", param=path, code="invalid_value")


def _telling(errors: list[ErrorDetails], body: object) -> ErrorDetails:
    """Of what is wrong with the first field that has something the most telling: a field of several kinds is wrong in
    the eyes of each; most say only that it is another.
    """
    field = errors[0]["loc"][:1]

    def kindred(error: ErrorDetails) -> tuple[bool, int]:
        return error["type"].endswith("_type"), -_path(error["loc"], body, missing=False).count("[")

    return min((error for error in errors if error["loc"][:1] == field), key=kindred)


def _path(location: tuple[int | str, ...], body: object, *, missing: bool) -> str:
    """`messages[0].content` for a location in pydantic's terms, which also names branches of unions.

    The last step of what is `missing` is nowhere in the body.
    """
    path, here = "", body
    for number, step in enumerate(location):
        if isinstance(step, int) and isinstance(here, list):
            path, here = f"{path}[{step}]", here[step]
        elif (
            isinstance(step, str)
            and isinstance(here, dict)
            and (step in here or (missing and number == len(location) - 1))
        ):
            path, here = f"{path}.{step}" if path else step, here.get(step)
    return path


def _nul_in(value: object, path: str = "") -> str | None:
    """The path of a text that has the character NUL, or of a field whose name has it."""
    if isinstance(value, str):
        return path if "\0" in value else None
    inner: list[tuple[str, object]] = []
    if isinstance(value, dict):
        inner = [(f"{path}.{name}" if path else name, one) for name, one in value.items()]
        if (name := next((name for name, _ in inner if "\0" in name), None)) is not None:
            return name
    elif isinstance(value, list):
        inner = [(f"{path}[{number}]", one) for number, one in enumerate(value)]
    return next((found for name, one in inner if (found := _nul_in(one, name)) is not None), None)


def show(value: object) -> str:
    """A value as a message names it."""
    text = pydantic_core.to_json(value, inf_nan_mode="constants").decode()
    return text if len(text) <= MAX_REPR else text[: MAX_REPR - 3] + "..."
