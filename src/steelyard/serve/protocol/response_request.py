"""`/v1/responses`: the shape of its requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, WithJsonSchema

from steelyard.errors import RequestError
from steelyard.serve.protocol import response_items
from steelyard.serve.protocol.fields import Fields, Metadata, describe_neutral
from steelyard.serve.protocol.response_items import INPUT, MAX_ITEMS, Item
from steelyard.serve.protocol.sampling import SamplingFields
from steelyard.serve.protocol.structured import MAX_SCHEMA_NAME
from steelyard.serve.protocol.tools import MOST_TOOLS, NAME, Function, Offer
from steelyard.text import grammar

LOGPROBS = "message.output_text.logprobs"
MOST_INSTRUCTIONS = 1 << 20
RESPONSE_ID = r"^[A-Za-z0-9_-]{1,128}$"


class TextFormat(Fields):
    """Plain text, JSON, or JSON of a schema."""

    stored = False
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$", max_length=MAX_SCHEMA_NAME)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: None = None
    """Refused at anything else: the model is not told of it. Say it in a message."""
    strict: bool | None = None
    """Accepted either way: an answer is always what the schema says."""

    @pydantic.model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if (self.type == "json_schema") != (value is not None):
                reason = "is needed by type json_schema, and means nothing to others"
                raise RequestError(f"'text.format.{name}' {reason}", param=f"text.format.{name}")
        return self


class TextOptions(Fields):
    """What a text has to be."""

    stored = False
    format: TextFormat | None = None
    verbosity: None = None


class FunctionTool(Fields):
    """A function that a model may ask to be called."""

    stored = False
    type: Literal["function"]
    name: NAME
    description: Annotated[str, Field(max_length=4096)] | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; absent: no arguments."""
    strict: bool | None = None
    """Accepted either way: arguments are always what the schema says."""

    @property
    def function(self) -> Function:
        """As a chat has it."""
        return Function(name=self.name, description=self.description, parameters=self.parameters, strict=self.strict)


class NamedFunctionTool(Fields):
    """The function that has to be called."""

    stored = False
    type: Literal["function"]
    name: NAME


class ResponseStreamOptions(Fields):
    """What a stream says besides its events: nothing."""

    include_obfuscation: Literal[False] | None = None


class InputTokensRequest(Fields):
    """What a model is to read."""

    model_config = pydantic.ConfigDict(json_schema_extra=describe_neutral)
    stored = False
    neutral = {"conversation": (), "personality": (), "reasoning": ({},), "truncation": ("disabled",)}

    model: str
    input: Annotated[list[Item], WithJsonSchema(INPUT)]
    """A text, or items: messages, calls of functions and their results."""
    instructions: Annotated[str, Field(max_length=MOST_INSTRUCTIONS)] | None = None
    """A system message before all others; those of a response before are not carried over."""
    previous_response_id: Annotated[str, Field(pattern=RESPONSE_ID)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    """Absent: `auto` where there are tools."""
    parallel_tool_calls: bool | None = None
    """False: at most one call. Absent or true: several are possible."""
    text: TextOptions | None = None

    @pydantic.field_validator("input", mode="before")
    @classmethod
    def _input(cls, value: object) -> list[Item]:
        return response_items.read(value)

    @pydantic.model_validator(mode="after")
    def _tools_agree(self) -> InputTokensRequest:
        self.offer.check()
        if self.offer.offered and self.structured:
            raise RequestError("'tools' and a form of the answer exclude each other: leave one out", param="tools")
        return self

    @property
    def offer(self) -> Offer:
        """What of the tools may be called, and how."""
        choice = self.tool_choice
        return Offer(
            tuple(tool.function for tool in self.tools or ()),
            "required" if isinstance(choice, NamedFunctionTool) else choice or "auto",
            choice.name if isinstance(choice, NamedFunctionTool) else None,
            self.parallel_tool_calls is not False,
            "tools[{}].parameters",
        )

    @property
    def format(self) -> TextFormat:
        """What the text of an answer has to be."""
        given = None if self.text is None else self.text.format
        return given or TextFormat(type="text")

    @property
    def structured(self) -> bool:
        """Whether not every text will do."""
        return self.format.type != "text"

    @property
    def form(self) -> str | None:
        """What an answer has to be, as an engine compiles it; None: any text. Making it may take some milliseconds.

        Raises:
            RequestError: what of it is not kept here.
        """
        if self.offer.offered:
            return self.offer.grammar
        if not self.structured:
            return None
        param = "text.format.schema" if self.format.schema_ is not None else "text.format"
        return grammar.of_schema(self.format.schema_ or {"type": "object"}, param)

    def messages(self, history: list[Item]) -> list[dict[str, str]]:
        """The conversation: instructions, what was before, the input.

        Raises:
            RequestError: it is too long; or as `response_items.turns` does.
        """
        if len(history) + len(self.input) > MAX_ITEMS:
            reason = f"the input and what was before it are more than {MAX_ITEMS} items: begin anew with what matters"
            raise RequestError(reason, param="previous_response_id")
        said = response_items.turns(history, self.input)
        return said if self.instructions is None else [{"role": "system", "content": self.instructions}, *said]


class ResponseRequest(InputTokensRequest):
    """Input to answer."""

    neutral = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning": ({},),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }

    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    """False: nothing is kept. Absent or true: the response can be read again, deleted and gone on from for 30 days."""
    metadata: Metadata | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    """Who asks; either: he gets the same model of an alias every time."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    draft: bool | None = None
    """These four as chats have them."""

    @pydantic.model_validator(mode="after")
    def _agree(self) -> ResponseRequest:
        if self.stream_options is not None and not self.stream:
            raise RequestError("'stream_options' is only for requests with 'stream': true", param="stream_options")
        if self.top_logprobs and not self.include:
            raise RequestError(f"'top_logprobs' is only for requests that include {LOGPROBS}", param="top_logprobs")
        if self.include and self.offer.offered:
            raise RequestError("log-probabilities are not told of answers with 'tools'", param="include")
        return self

    @property
    def logprobs(self) -> int | None:
        """How many likeliest tokens are told of beside each; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.include else None

    @property
    def sampling(self) -> SamplingFields:
        """How text is drawn."""
        return SamplingFields(
            model=self.model,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            top_k=self.top_k,
            min_p=self.min_p,
            draft=self.draft,
        )
