"""`/v1/explain`: the shape of its requests and of its answers. Ours."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, WithJsonSchema

from steelyard.errors import RequestError
from steelyard.serve.protocol.chat import MESSAGES, read_messages
from steelyard.serve.protocol.examples import Example
from steelyard.serve.protocol.explanations import Explained, ExplainOptions
from steelyard.serve.protocol.reading import ReadingFields, Text

MOST_NEAREST = 20


class ExplainRequest(ReadingFields, ExplainOptions):
    """A text or a conversation, and what a model says of it."""

    input: Text | Example | None = None
    """A text; of a classifier of images, or of several kinds, an example."""
    messages: Annotated[list[dict[str, str]], WithJsonSchema(MESSAGES)] | None = None
    """Of a model that chats, instead of `input`."""
    nearest: Annotated[int, Field(ge=0, le=MOST_NEAREST)] | None = None
    """Of a model that was tuned here by this project: rows that it learnt from that are most like what is explained."""
    target: Annotated[str, Field(min_length=1, max_length=1 << 14)] | None = None
    """The class, or the answer, that is explained; default: the likeliest class, of a conversation the likeliest answer
    token by token, 32 at most, of a text the likeliest next token."""

    @pydantic.field_validator("messages", mode="before")
    @classmethod
    def _messages(cls, value: object) -> list[dict[str, str]] | None:
        return None if value is None else read_messages(value)

    @pydantic.model_validator(mode="after")
    def _either(self) -> ExplainRequest:
        if (self.input is None) == (self.messages is None):
            raise RequestError("give either 'input', a text, or 'messages', a conversation", param="input")
        return self


class Explanation(Explained, frozen=True, kw_only=True):
    """By itself."""

    id: str
    created: int
    model: str
    object: Literal["explanation"] = "explanation"
