"""How text is asked for: what chat and completions have in common.

Knows JSON, fields and values; nothing of models, tokens or HTTP.
"""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field, WithJsonSchema

from steelyard.errors import RequestError
from steelyard.infer.request import Beam
from steelyard.serve.protocol.fields import Fields, describe_neutral, show
from steelyard.serve.protocol.structured import ResponseFormat, StructuredOutputs

MAX_CHOICES = 128
MAX_BEAMS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_LOGIT_BIASES = 1024
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


class StreamOptions(Fields):
    """What a stream says besides its text."""

    include_usage: bool | None = None


class SamplingFields(Fields):
    """What both ways of asking for text have in common."""

    model_config = pydantic.ConfigDict(json_schema_extra=describe_neutral)
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
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
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
                raise RequestError(f"'logit_bias' has the key {show(token)}: no token id", param="logit_bias")
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
    def _structured(self) -> SamplingFields:
        plain = self.response_format is None or self.response_format.type == "text"
        if self.structured_outputs is not None and not plain:
            raise RequestError(
                "'structured_outputs' and 'response_format' exclude each other", param="structured_outputs"
            )
        if self.structured and self.ignore_eos:
            raise RequestError("'ignore_eos' is not for answers that end where they are whole", param="ignore_eos")
        return self

    @property
    def structured(self) -> bool:
        """Whether not every text will do."""
        return self.structured_outputs is not None or (
            self.response_format is not None and self.response_format.type != "text"
        )

    @property
    def grammar_field(self) -> str:
        """Where what an answer has to be is said."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def grammar(self) -> str | None:
        """What an answer has to be, as an engine compiles it; None: any text. Making it may take some milliseconds.

        Raises:
            RequestError: what of it is not kept here.
        """
        if self.structured_outputs is not None:
            return self.structured_outputs.grammar
        return None if self.response_format is None else self.response_format.grammar

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
