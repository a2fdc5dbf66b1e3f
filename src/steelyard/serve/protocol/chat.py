"""`/v1/chat/completions`: the shape of its requests and of its answers, whole and in chunks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field, WithJsonSchema

from steelyard.errors import RequestError
from steelyard.infer.request import TokenLogprob
from steelyard.serve.protocol.fields import Metadata, accept_neutral, neutral_properties
from steelyard.serve.protocol.prompt_logprobs import PromptLogprobs
from steelyard.serve.protocol.sampling import SamplingFields
from steelyard.serve.protocol.usage import Finish, Usage
from steelyard.text.tokenizer import Tokenizer

MAX_MESSAGES = 4096

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles that are honoured, and what the chat template calls them."""

MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}
"""Fields of a message that are accepted at these values, such as an answer of ours that is sent back has them."""

TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": TEXT_PART}]},
            **neutral_properties(MESSAGE_NEUTRAL),
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    },
}
"""Messages as they are written."""


class ChatRequest(SamplingFields):
    """A conversation to continue."""

    store: bool | None = None
    """Keep the answer, to be listed, deleted, or made a training file of."""
    metadata: Metadata | None = None
    messages: Annotated[list[dict[str, str]], WithJsonSchema(MESSAGES)]
    """Each with `role` (system, user or assistant) and `content`; the text parts of one are joined by newlines."""
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @pydantic.field_validator("messages", mode="before")
    @classmethod
    def _messages(cls, value: object) -> list[dict[str, str]]:
        if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
            raise RequestError(f"'messages' must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
        return [_message(message, f"messages[{number}]") for number, message in enumerate(value)]

    @pydantic.model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("'max_tokens' and 'max_completion_tokens' differ: send one of them", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("'top_logprobs' is only for requests with 'logprobs': true", param="top_logprobs")
        if self.metadata and not self.store:
            raise RequestError("'metadata' is only for requests with 'store': true", param="metadata")
        return self


def _message(message: object, path: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(f"'{path}' must be an object with 'role' and 'content'", param=path)
    kept = accept_neutral(message, MESSAGE_NEUTRAL, ("role", "content"), f"{path}.")
    role = kept.get("role")
    if not isinstance(role, str) or role not in ROLES:
        wrong = f", not '{role[:40]}'" if isinstance(role, str) else ""
        raise RequestError(f"'{path}.role' must be one of {', '.join(ROLES)}{wrong}", param=f"{path}.role")
    return {"role": ROLES[role], "content": _content(kept.get("content"), f"{path}.content")}


def _content(content: object, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise RequestError(f"'{path}' must be a string or a list of text parts", param=path)
    texts: list[str] = []
    for number, part in enumerate(content):
        here = f"{path}[{number}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RequestError(f"'{here}' must be a text part: this model reads text only", param=f"{here}.type")
        text = accept_neutral(part, {}, ("type", "text"), f"{here}.").get("text")
        if not isinstance(text, str):
            raise RequestError(f"'{here}.text' must be a string", param=f"{here}.text")
        texts.append(text)
    return "\n".join(texts)


class Alternative(msgspec.Struct, frozen=True):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(msgspec.Struct, frozen=True):
    """A token that was chosen, and what was likely at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of the tokens of a message."""

    content: list[ChosenToken]
    refusal: None = None


class Message(msgspec.Struct, frozen=True):
    """What the assistant says."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One of n answers."""

    index: int
    message: Message
    finish_reason: Finish
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """The answer to a request without `stream`."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    """There if they were asked for."""
    object: Literal["chat.completion"] = "chat.completion"


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """What a chunk adds to one of n answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    """Absent unless `include_usage` asks for it; then null in every chunk but the last."""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


def chat_logprobs(tokens: list[TokenLogprob], tokenizer: Tokenizer) -> ChatLogprobs:
    """Log-probabilities of the engine in the shape of chat."""
    return ChatLogprobs(
        [
            ChosenToken(
                token.text,
                token.logprob,
                list(tokenizer.token_bytes(token.token)),
                [Alternative(text, value, list(tokenizer.token_bytes(id))) for id, text, value in token.top],
            )
            for token in tokens
        ]
    )
