"""`/v1/responses`: the shapes of the events of a stream, in the order in which they come."""

from __future__ import annotations

import msgspec

from steelyard.serve.protocol.chat import ChosenToken
from steelyard.serve.protocol.response_object import OutputItem, OutputText, ReasoningText, ResponseObject


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    sequence_number: int
    """From 0."""


class _OfItem(_Event, frozen=True, kw_only=True):
    output_index: int


class _OfContent(_OfItem, frozen=True, kw_only=True):
    item_id: str
    content_index: int = 0


class ResponseCreated(_Event, frozen=True, kw_only=True, tag="response.created"):
    """The response begins."""

    response: ResponseObject


class ResponseInProgress(_Event, frozen=True, kw_only=True, tag="response.in_progress"):
    """It is worked on."""

    response: ResponseObject


class OutputItemAdded(_OfItem, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins."""

    item: OutputItem


class ContentPartAdded(_OfContent, frozen=True, kw_only=True, tag="response.content_part.added"):
    """The part of a message, or of thoughts, begins."""

    part: OutputText | ReasoningText


class OutputTextDelta(_OfContent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """More of its text."""

    delta: str
    logprobs: list[ChosenToken]


class OutputTextDone(_OfContent, frozen=True, kw_only=True, tag="response.output_text.done"):
    """Its text is whole."""

    text: str
    logprobs: list[ChosenToken]


class ContentPartDone(_OfContent, frozen=True, kw_only=True, tag="response.content_part.done"):
    """The part is whole."""

    part: OutputText | ReasoningText


class ReasoningTextDelta(_OfContent, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """More of the thoughts."""

    delta: str


class ReasoningTextDone(_OfContent, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """They are whole."""

    text: str


class ArgumentsDelta(_OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """More of the arguments of a call."""

    item_id: str
    delta: str


class ArgumentsDone(_OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """They are whole."""

    item_id: str
    name: str
    arguments: str


class OutputItemDone(_OfItem, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item ends."""

    item: OutputItem


class ResponseCompleted(_Event, frozen=True, kw_only=True, tag="response.completed"):
    """The response is whole."""

    response: ResponseObject


class ResponseIncomplete(_Event, frozen=True, kw_only=True, tag="response.incomplete"):
    """It was cut off by `max_output_tokens` or the context."""

    response: ResponseObject


class ResponseFailed(_Event, frozen=True, kw_only=True, tag="response.failed"):
    """It broke off; no event follows."""

    response: ResponseObject


ItemEvent = (
    OutputItemAdded
    | ContentPartAdded
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ContentPartDone
    | ArgumentsDelta
    | ArgumentsDone
    | OutputItemDone
)
ResponseEvent = (
    ResponseCreated | ResponseInProgress | ItemEvent | ResponseCompleted | ResponseIncomplete | ResponseFailed
)
