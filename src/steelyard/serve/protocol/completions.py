"""`/v1/completions`: the shape of its requests and of its answers; a chunk of a stream has the shape of an answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.infer.request import TokenLogprob
from steelyard.serve.protocol.fields import SamplingFields
from steelyard.serve.protocol.usage import Finish, Usage

MAX_PROMPTS = 64


class CompletionRequest(SamplingFields):
    """Texts to continue."""

    prompt: list[Any]
    """Each a string or a list of token ids, whichever way they were given."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None

    @pydantic.field_validator("prompt", mode="before")
    @classmethod
    def _prompt(cls, value: object) -> list[Any]:
        prompts = value if isinstance(value, list) and not _is_tokens(value) else [value]
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise RequestError(f"'prompt' must hold 1 to {MAX_PROMPTS} prompts", param="prompt")
        all_texts = all(isinstance(prompt, str) for prompt in prompts)
        if not all_texts and not all(_is_tokens(prompt) for prompt in prompts):
            raise RequestError(
                "'prompt' must be a string, a list of strings, a list of token ids or a list of such lists, none empty",
                param="prompt",
            )
        return prompts

    @pydantic.model_validator(mode="after")
    def _best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.choices:
            raise RequestError("'best_of' is not supported here: remove it, or let it equal 'n'", param="best_of")
        return self


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities, one entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One continuation of one prompt; choices are numbered prompt by prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None


class Completion(msgspec.Struct, frozen=True):
    """The answer, or one event of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    """Absent from a stream unless `include_usage` asks for it; then null in every chunk but the last."""
    object: Literal["text_completion"] = "text_completion"


def completion_logprobs(tokens: list[TokenLogprob], offset: int) -> tuple[CompletionLogprobs, int]:
    """Log-probabilities of the engine in the older shape, and the offset at which the next token begins.

    Args:
        tokens: in order.
        offset: characters of the tokens of this choice so far.
    """
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    # Two tokens may read alike: the likelier one comes first and stays.
    tops = [{text: value for _, text, value in reversed(token.top)} for token in tokens]
    logprobs = [token.logprob for token in tokens]
    return CompletionLogprobs([token.text for token in tokens], logprobs, tops, offsets), offset
