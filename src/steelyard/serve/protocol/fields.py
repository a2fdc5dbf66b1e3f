"""A request body to a checked request: every field is honoured, or accepted at its neutral value, or refused by name.

Knows JSON, fields and values; nothing of models, tokens or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
import pydantic_core
from pydantic import Field, WithJsonSchema

from steelyard.errors import RequestError
from steelyard.infer.request import Beam

MAX_CHOICES = 128
MAX_BEAMS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_LOGIT_BIASES = 1024
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
    "response_format": ({"type": "text"},),
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
    "structured_outputs": (),
    # Ours.
    "explain": (False,),
}
"""Fields that are accepted at these values, where nothing is to be done for them, and refused by name at any other."""

OF_BEAMS = {"beam_width": None, "length_penalty": 1.0, "num_beam_groups": 1, "diversity_penalty": 0.0}
"""Fields that mean nothing without beam search, and the values at which they say nothing."""
USUAL_BEAMS = 4
STOP_STRING = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
STOP = STOP_STRING | Annotated[list[STOP_STRING], Field(max_length=MAX_STOP_STRINGS)] | None
LOGIT_BIAS = {
    "type": ["object", "null"],
    "maxProperties": MAX_LOGIT_BIASES,
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
"""These two are described as they are written; what becomes of them is another type."""

Body = TypeVar("Body", bound="Fields")

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
"""Pairs that something is found by."""


class Fields(pydantic.BaseModel):
    """A JSON object whose fields are all known; bools are no numbers and numbers are finite."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    stored: ClassVar[bool] = True
    """Whether its texts may come to the database, so that none may have the character NUL."""


class StreamOptions(Fields):
    """What a stream says besides its text."""

    include_usage: bool | None = None


def neutral_properties(neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """How fields are described that are accepted at some values only."""
    return {name: {"enum": [None, *values]} for name, values in neutral.items()}


def _describe_neutral(schema: dict[str, Any], kind: type[pydantic.BaseModel]) -> None:
    schema["properties"] = {**neutral_properties(NEUTRAL), **schema["properties"]}


class SamplingFields(Fields):
    """What both ways of asking for text have in common."""

    model_config = pydantic.ConfigDict(json_schema_extra=_describe_neutral)
    stored = False

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    logit_bias: Annotated[dict[int, float], WithJsonSchema(LOGIT_BIAS)] = {}
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    """Who asks; either: he gets the same model of an alias every time."""
    use_beam_search: bool | None = None
    """The likeliest continuations as a whole, instead of draws; `n` come back, the best first, all at the end."""
    beam_width: Annotated[int, Field(ge=1, le=MAX_BEAMS)] | None = None
    """Beginnings that are kept; absent: n, or 4 where that is 1."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    """A continuation's log-probability is divided by its length to this power."""
    num_beam_groups: Annotated[int, Field(ge=1, le=MAX_BEAMS)] | None = None
    """Groups of beams that keep apart."""
    diversity_penalty: Annotated[float, Field(ge=0, le=1000)] | None = None
    """What a group pays for a token that groups before it have chosen at the same place."""
    draft: bool | None = None
    """False: tokens are not guessed ahead. Absent or true: they are where it pays. The answer is the same."""

    @pydantic.field_validator("stop", mode="before", json_schema_input_type=STOP)
    @classmethod
    def _stop(cls, value: object) -> tuple[str, ...]:
        strings = [] if value is None else value if isinstance(value, list) else [value]
        if len(strings) > MAX_STOP_STRINGS:
            raise RequestError(f"'stop' has {len(strings)} strings; {MAX_STOP_STRINGS} are the limit", param="stop")
        for string in strings:
            if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"'stop' must be a string or a list of strings, each of 1 to {MAX_STOP_LENGTH} characters",
                    param="stop",
                )
        return tuple(strings)

    @pydantic.field_validator("logit_bias", mode="before")
    @classmethod
    def _logit_bias(cls, value: object) -> dict[int, float]:
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIASES:
            raise RequestError(
                f"'logit_bias' must be an object of at most {MAX_LOGIT_BIASES} token ids", param="logit_bias"
            )
        biases: dict[int, float] = {}
        for token, bias in value.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and token == str(int(token))):
                raise RequestError(f"'logit_bias' has the key {_show(token)}: no token id", param="logit_bias")
            # Written so that NaN fails it too.
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise RequestError(f"'logit_bias' of token {token} must be -100 to 100", param="logit_bias")
            biases[int(token)] = float(bias)
        return biases

    @pydantic.model_validator(mode="after")
    def _stream_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise RequestError("'stream_options' is only for requests with 'stream': true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("'prompt_logprobs' is not for requests with 'stream': true", param="prompt_logprobs")
        return self

    @pydantic.model_validator(mode="after")
    def _beams(self) -> SamplingFields:
        for name, neutral in OF_BEAMS.items():
            value = getattr(self, name)
            if not self.use_beam_search and value not in (None, neutral):
                raise RequestError(f"'{name}' is only for requests with 'use_beam_search': true", param=name)
        if self.use_beam_search and (beam := self.beam) is not None:
            if self.choices > beam.width:
                raise RequestError(f"'n' is more than 'beam_width', {beam.width}", param="n")
            if beam.width % beam.groups:
                raise RequestError(f"{beam.width} beams are not {beam.groups} equal groups", param="num_beam_groups")
        return self

    @property
    def beam(self) -> Beam | None:
        """How beams are searched; None: tokens are drawn."""
        if not self.use_beam_search:
            return None
        return Beam(
            width=self.beam_width or (self.choices if self.choices > 1 else USUAL_BEAMS),
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            groups=self.num_beam_groups or 1,
            diversity=self.diversity_penalty or 0.0,
        )

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def choices(self) -> int:
        """Choices for each prompt."""
        return self.n or 1


def parse(kind: type[Body], content: bytes) -> Body:
    """A request of type `kind` from the bytes of a body.

    Raises:
        RequestError: it is no JSON object, or a field is missing, unknown, of another type, out of range or not
            supported at this value; `param` names it.
    """
    try:
        body = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    if kind.stored and b"\\u0000" in content and (path := _nul_in(body)) is not None:
        raise RequestError(f"'{path}' has the character NUL: remove it", param=path, code="invalid_value")
    honoured = accept_neutral(body, NEUTRAL, kind.model_fields.keys())
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
                f"'{path}' is not supported here at {_show(value)}: remove it", param=path, code="unsupported_parameter"
            )
    return kept


def _explained(error: pydantic.ValidationError, body: object) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    path = _path(first["loc"], body)
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field '{path}': remove it", param=path, code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(f"'{path}' is missing", param=path, code="missing_required_parameter")
    reason = first["msg"].removeprefix("Input should be ")
    return RequestError(f"'{path}' must be {reason}, not {_show(first['input'])}", param=path, code="invalid_value")


def _path(location: tuple[int | str, ...], body: object) -> str:
    """`messages[0].content` for a location in pydantic's terms, which also names branches of unions."""
    path, here = "", body
    for number, step in enumerate(location):
        if isinstance(step, int) and isinstance(here, list):
            path, here = f"{path}[{step}]", here[step]
        elif isinstance(step, str) and isinstance(here, dict) and (step in here or number == len(location) - 1):
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


def _show(value: object) -> str:
    text = pydantic_core.to_json(value, inf_nan_mode="constants").decode()
    return text if len(text) <= MAX_REPR else text[: MAX_REPR - 3] + "..."
