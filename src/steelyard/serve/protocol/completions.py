"""`/v1/completions`: the shape of its requests and of its answers; a chunk of a stream has the shape of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.infer.request import PromptLogprob, TokenLogprob
from steelyard.serve.protocol.prompt_logprobs import PromptLogprobs
from steelyard.serve.protocol.sampling import SamplingFields
from steelyard.serve.protocol.usage import Finish, Usage
from steelyard.text.detokenizer import Detokenizer
from steelyard.text.tokenizer import Tokenizer

MAX_PROMPTS = 64

TOKENS = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
PROMPT = (
    str
    | TOKENS
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TOKENS], Field(min_length=1, max_length=MAX_PROMPTS)]
)
"""A prompt as it is written."""


class CompletionRequest(SamplingFields):
    """Texts to continue."""

    prompt: list[Any]
    """Each a string or a list of token ids, whichever way they were given."""
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None

    @pydantic.field_validator("prompt", mode="before", json_schema_input_type=PROMPT)
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

    @pydantic.model_validator(mode="after")
    def _max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise RequestError(
                "'max_tokens' must be at least 1, or 0 with 'echo' or 'prompt_logprobs'", param="max_tokens"
            )
        return self

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens the engine names at each place of the prompt; None: it is not scored."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((one for one in wanted if one is not None), default=None)


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities, one entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One continuation of one prompt; choices are numbered prompt by prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    """There if they were asked for."""


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


class TextOffsets:
    """Where the tokens of a text begin in it, in characters, and their log-probabilities in the older shape.

    Args:
        tokenizer: of the model.
        begin: where the first token begins.
        control: control tokens are part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, begin: int = 0, *, control: bool = False) -> None:
        self._tokenizer, self._place, self._control = tokenizer, begin, control
        self._text = Detokenizer(tokenizer)

    def skip(self, token: int) -> int:
        """Where `token` begins; the next one begins after it."""
        begin = self._place
        if self._control and token in self._tokenizer.special_tokens:
            self._place += len(self._tokenizer.special_tokens[token])
        else:
            self._place += len(self._text.push(token))
        return begin

    def logprobs(self, tokens: Sequence[TokenLogprob], likeliest: int) -> CompletionLogprobs:
        """The next tokens, each with the `likeliest` ones at its place."""
        return CompletionLogprobs(
            [token.text for token in tokens],
            [token.logprob for token in tokens],
            # Two tokens may read alike: the likelier one comes first and stays.
            [{text: value for _, text, value in reversed(token.top[:likeliest])} for token in tokens],
            [self.skip(token.token) for token in tokens],
        )


class EchoedPrompt(msgspec.Struct, frozen=True):
    """A prompt as the engine gets it, and as an answer repeats it."""

    ids: list[int]
    text: str
    hidden: int = 0
    """So many of its first tokens are no part of the text."""

    @classmethod
    def of_text(cls, text: str, tokenizer: Tokenizer) -> EchoedPrompt:
        """A text; the token that begins one is put before it, if the tokenizer does so."""
        ids = tokenizer.encode(text, add_special_tokens=True)
        first = tokenizer.special_tokens.get(ids[0]) if ids else None
        return cls(ids, text, hidden=int(first is not None and not text.startswith(first)))

    @classmethod
    def of_tokens(cls, ids: list[int], tokenizer: Tokenizer) -> EchoedPrompt:
        """Token ids; control tokens among them are part of the text."""
        return cls(ids, tokenizer.decode(ids, skip_special_tokens=False))

    def logprobs(self, scored: Sequence[PromptLogprob], likeliest: int, tokenizer: Tokenizer) -> CompletionLogprobs:
        """Its tokens: the first has no log-probability, the others are `scored`."""
        offsets = TextOffsets(tokenizer, control=True)
        first = CompletionLogprobs([tokenizer.token_text(self.ids[0])], [None], [None], [0])
        if not self.hidden:
            offsets.skip(self.ids[0])
        return joined([first, offsets.logprobs(scored, likeliest)])


def joined(parts: Iterable[CompletionLogprobs]) -> CompletionLogprobs:
    """Several as one."""
    whole = CompletionLogprobs([], [], [], [])
    for part in parts:
        for name in CompletionLogprobs.__struct_fields__:
            getattr(whole, name).extend(getattr(part, name))
    return whole
