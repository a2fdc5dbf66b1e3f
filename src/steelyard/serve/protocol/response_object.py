"""`/v1/responses`: the shape of a response, its items and its usage."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from steelyard.serve.protocol.chat import ChosenToken
from steelyard.serve.protocol.response_request import ResponseRequest, TextFormat
from steelyard.serve.protocol.usage import Usage

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """What is said."""

    text: str
    annotations: list[str] = []
    """Always empty."""
    logprobs: list[ChosenToken] = []


class OutputMessage(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """The assistant says something."""

    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """What is thought."""

    text: str


class ReasoningItem(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    """The model thinks before it answers."""

    id: str
    status: Status
    content: list[ReasoningText]
    summary: list[str] = []
    """Always empty: thoughts are told as they are."""


class FunctionCall(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """The assistant asks for a call."""

    id: str
    call_id: str
    name: str
    arguments: str
    """JSON; only its beginning if the status is `incomplete`."""
    status: Status


OutputItem = OutputMessage | ReasoningItem | FunctionCall


class InputTokensDetails(msgspec.Struct, frozen=True):
    """Where input tokens came from."""

    cached_tokens: int
    cache_write_tokens: int = 0
    """Always 0: keeping what was read costs nothing."""


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """What output tokens went to."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    cost: float
    """Dollars, of the entry in the ledger; whole nano-dollars."""

    @staticmethod
    def of(usage: Usage, reasoning: int = 0) -> ResponseUsage:
        """In these words; and how many of the tokens were thoughts."""
        return ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(reasoning),
            usage.total_tokens,
            usage.cost,
        )


class ResponseError(msgspec.Struct, frozen=True):
    """Why a response failed."""

    message: str
    code: Literal["server_error"] = "server_error"


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class OfferedFunction(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    """A function that may be called, as it was asked."""

    name: str
    parameters: dict[str, Any] | None
    description: str | None
    strict: bool


class ChosenFunction(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    """The function that had to be called."""

    name: str


class Reasoning(msgspec.Struct, frozen=True):
    """There is none."""

    effort: None = None
    summary: None = None


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """A response: what was asked, and what is answered."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[OutputItem]
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    safety_identifier: str | None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction
    tools: list[OfferedFunction]
    top_logprobs: int
    top_p: float
    user: str | None
    background: Literal[False] = False
    max_tool_calls: None = None
    reasoning: Reasoning = Reasoning()
    service_tier: Literal["default"] = "default"
    truncation: Literal["disabled"] = "disabled"
    object: Literal["response"] = "response"

    @staticmethod
    def of(body: ResponseRequest, id: str, created: int, model: str) -> ResponseObject:
        """A response to `body` that has just begun."""
        offer = body.offer
        return ResponseObject(
            id=id,
            created_at=created,
            model=model,
            status="in_progress",
            output=[],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=offer.several,
            previous_response_id=body.previous_response_id,
            safety_identifier=body.safety_identifier,
            store=body.store is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            text={"format": _format(body.format)},
            tool_choice=offer.choice if offer.named is None else ChosenFunction(offer.named),
            tools=[
                OfferedFunction(one.name, one.parameters, one.description, one.strict is not False)
                for one in offer.functions
            ],
            top_logprobs=body.top_logprobs or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            user=body.user,
        )


def _format(asked: TextFormat) -> dict[str, Any]:
    if asked.type != "json_schema":
        return {"type": asked.type}
    more = {"description": None, "strict": asked.strict is not False}
    return {"type": asked.type, "name": asked.name, "schema": asked.schema_, **more}


class ResponseDeleted(msgspec.Struct, frozen=True):
    """It is gone."""

    id: str
    deleted: bool = True
    object: Literal["response"] = "response"


class InputTokens(msgspec.Struct, frozen=True):
    """How many tokens a model would read."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"
