"""`/v1/chat/completions`: the shape of its requests and of its answers, whole and in chunks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field, WithJsonSchema

from steelyard.errors import RequestError
from steelyard.infer.request import TokenLogprob
from steelyard.serve.protocol.explanations import Explained, Wanted
from steelyard.serve.protocol.fields import Metadata, accept_neutral, neutral_properties
from steelyard.serve.protocol.prompt_logprobs import PromptLogprobs
from steelyard.serve.protocol.sampling import SamplingFields
from steelyard.serve.protocol.tools import MOST_TOOLS, ToolCall, ToolCallDelta, ToolFields, spoken
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
CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": TEXT_PART}]}
CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "arguments": {"type": "string", "contentMediaType": "application/json"},
            },
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "function"],
}


THOUGHTS = {"type": ["string", "null"]}
"""What an assistant thought before: taken back with his message, and not read again."""


def _shape(role: Any, content: Any, required: list[str], **others: Any) -> dict[str, Any]:
    neutral = neutral_properties(MESSAGE_NEUTRAL)
    return {
        "type": "object",
        "properties": {**neutral, "role": role, "content": content, **others},
        "required": ["role", *required],
        "additionalProperties": False,
    }


MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "anyOf": [
            _shape({"enum": list(ROLES)}, CONTENT, ["content"]),
            _shape({"const": "assistant"}, CONTENT, ["content"], reasoning_content=THOUGHTS),
            _shape(
                {"const": "assistant"},
                {"anyOf": [*CONTENT["anyOf"], {"type": "null"}]},
                ["tool_calls"],
                tool_calls={"type": "array", "minItems": 1, "maxItems": MOST_TOOLS, "items": CALL},
                reasoning_content=THOUGHTS,
            ),
            {
                "type": "object",
                "properties": {
                    "role": {"const": "tool"},
                    "content": CONTENT,
                    "tool_call_id": {"type": "string"},
                    "name": {"type": "null"},
                },
                "required": ["role", "content", "tool_call_id"],
                "additionalProperties": False,
            },
        ]
    },
}
"""Messages as they are written."""


class ChatRequest(SamplingFields, ToolFields):
    """A conversation to continue."""

    store: bool | None = None
    """Keep the answer, to be listed, deleted, or made a training file of."""
    metadata: Metadata | None = None
    messages: Annotated[list[dict[str, str]], WithJsonSchema(MESSAGES)]
    """Each with `role` (system, user or assistant) and `content`; the text parts of one are joined by newlines."""
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    explain: Wanted | None = None
    """Why it is answered so; of one answer."""

    @pydantic.field_validator("messages", mode="before")
    @classmethod
    def _messages(cls, value: object) -> list[dict[str, str]]:
        return read_messages(value)

    @pydantic.model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("'max_tokens' and 'max_completion_tokens' differ: send one of them", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("'top_logprobs' is only for requests with 'logprobs': true", param="top_logprobs")
        if self.explain and self.choices > 1:
            raise RequestError("'explain' is for one answer: leave 'n' out, or explain", param="explain")
        if self.metadata and not self.store:
            raise RequestError("'metadata' is only for requests with 'store': true", param="metadata")
        if self.offered and self.structured:
            raise RequestError("'tools' and a form of the answer exclude each other: leave one out", param="tools")
        if self.offered and self.ignore_eos:
            raise RequestError("'ignore_eos' is not for answers that end where they are whole", param="ignore_eos")
        return self

    @property
    def form(self) -> str | None:
        """What an answer has to be, calls of tools included. Raises as `grammar` does."""
        return self.calls_grammar if self.offered else self.grammar


def read_messages(value: object) -> list[dict[str, str]]:
    """Messages as a template takes them. Raises RequestError: one that is none; its field is named."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise RequestError(f"'messages' must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
    called: set[str] = set()
    return [_message(message, f"messages[{number}]", called) for number, message in enumerate(value)]


def _message(message: object, path: str, called: set[str]) -> dict[str, str]:
    """A message as the chat template is given it; calls of tools and their results are text.

    `called` are the ids of the calls before it, and gains its own.
    """
    if not isinstance(message, dict):
        raise RequestError(f"'{path}' must be an object with 'role' and 'content'", param=path)
    role = message.get("role")
    if role == "tool":
        return _result(message, path, called)
    known = (
        ("role", "content", "tool_calls") if role == "assistant" and message.get("tool_calls") else ("role", "content")
    )
    thoughts = message.get("reasoning_content")
    if role == "assistant" and (thoughts is None or isinstance(thoughts, str)):
        message = {name: value for name, value in message.items() if name != "reasoning_content"}
    kept = accept_neutral(message, MESSAGE_NEUTRAL, known, f"{path}.")
    if not isinstance(role, str) or role not in ROLES:
        wrong = f", not '{role[:40]}'" if isinstance(role, str) else ""
        raise RequestError(f"'{path}.role' must be one of {', '.join([*ROLES, 'tool'])}{wrong}", param=f"{path}.role")
    if "tool_calls" not in kept:
        return {"role": ROLES[role], "content": _content(kept.get("content"), f"{path}.content")}
    text, ids = spoken(kept["tool_calls"], f"{path}.tool_calls")
    called.update(ids)
    before = "" if kept.get("content") in (None, "") else _content(kept["content"], f"{path}.content") + "\n"
    return {"role": ROLES[role], "content": before + text}


def _result(message: dict[str, Any], path: str, called: set[str]) -> dict[str, str]:
    """What a tool said, as a user's turn: so models that were not told of tools read it as well."""
    kept = accept_neutral(message, {"name": ()}, ("role", "content", "tool_call_id"), f"{path}.")
    if kept.get("tool_call_id") not in called:
        reason = f"'{path}.tool_call_id' is the id of no call in the messages before it"
        raise RequestError(reason, param=f"{path}.tool_call_id")
    content = _content(kept.get("content"), f"{path}.content")
    return {"role": "user", "content": f"<tool_response>{content}</tool_response>"}


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

    content: str | None
    """None: it only calls tools."""
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    """What it thought before, if its template has marks for thoughts."""


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
    explanation: Explained | msgspec.UnsetType = msgspec.UNSET
    """Likewise."""
    explanation_error: str | msgspec.UnsetType = msgspec.UNSET
    """Why there is none, though it was asked for: the answer is there, and paid for."""
    object: Literal["chat.completion"] = "chat.completion"


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning_content: str | None = None


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
    explanation: Explained | msgspec.UnsetType = msgspec.UNSET
    """In a chunk of its own after the answer, if it was asked for."""
    explanation_error: str | msgspec.UnsetType = msgspec.UNSET
    """Why there is none, though it was asked for: the answer is there, and paid for."""
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
