"""`/v1/audio/transcriptions` in OpenAI's shape: the fields of its form, its answers and events."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.infer.sound import MOST_BEAMS, Hearing, Word
from steelyard.serve.protocol.fields import Fields, parse, show
from steelyard.serve.protocol.parameters import TEXT, Schema, integer_from, one_of

USUAL_BEAMS = 4
MOST_PROMPT = 4096
INTEGER, NUMBER = re.compile(r"-?[0-9]{1,9}"), re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?")
LISTS = ("timestamp_granularities",)
SEVERAL = tuple(f"{name}{end}" for name in LISTS for end in ("", "[]"))
"""Fields that may be there several times, under either name."""
UNSUPPORTED = {
    "chunking_strategy": "recordings are parted evenly, as the model takes them",
    "include": "log-probabilities of tokens are not told",
    "keywords": "put them into 'prompt', where the model takes one",
    "known_speaker_names": "speakers are not told apart",
    "known_speaker_references": "speakers are not told apart",
    "languages": "say one, in 'language'",
}
"""Fields of OpenAI's that are refused, and why."""

Format = Literal["json", "text", "verbose_json", "srt", "vtt"]
Granularity = Literal["word", "segment"]
FORMATS = ("json", "text", "verbose_json", "srt", "vtt")


class TranscriptionRequest(Fields):
    """What is wanted of a recording."""

    stored = False

    model: Annotated[str, Field(min_length=1)]
    language: Annotated[str, Field(max_length=16)] | None = None
    prompt: Annotated[str, Field(max_length=MOST_PROMPT)] | None = None
    response_format: Format | None = None
    temperature: float | None = None
    timestamp_granularities: Annotated[list[Granularity], Field(max_length=8)] | None = None
    """Of verbose_json; absent: segments."""
    stream: bool | None = None
    use_beam_search: bool | None = None
    """The likeliest transcript as a whole, instead of the likeliest token or character at each place."""
    beam_width: Annotated[int, Field(ge=1, le=MOST_BEAMS)] | None = None
    """Beginnings that are kept; absent: 4."""

    @pydantic.field_validator("response_format", mode="before")
    @classmethod
    def _format(cls, value: object) -> object:
        if value == "diarized_json":
            reason = "'response_format' is not supported here at diarized_json: speakers are not told apart"
            raise RequestError(reason, param="response_format", code="unsupported_parameter")
        return value

    @pydantic.model_validator(mode="after")
    def _together(self) -> TranscriptionRequest:
        if self.temperature not in (None, 0):
            reason = f"'temperature' is not supported here at {show(self.temperature)}: nothing is drawn; leave it at 0"
            raise RequestError(reason, param="temperature", code="unsupported_parameter")
        if self.timestamp_granularities and self.response_format != "verbose_json":
            reason = "'timestamp_granularities' is only for 'response_format': verbose_json"
            raise RequestError(reason, param="timestamp_granularities")
        if self.stream and self.response_format not in (None, "json", "text"):
            reason = f"'response_format' must be json or text with 'stream', not {self.response_format}"
            raise RequestError(reason, param="response_format")
        if self.beam_width is not None and not self.use_beam_search:
            raise RequestError("'beam_width' is only for requests with 'use_beam_search': true", param="beam_width")
        return self

    @property
    def granularities(self) -> Sequence[Granularity]:
        """Which times are told."""
        return self.timestamp_granularities or ("segment",)

    def hearing(self, words: bool) -> Hearing:
        """How it is heard; `words`: whether their times are told where nobody asks for them by name."""
        wanted = "word" in self.granularities or (words and self.response_format in ("srt", "vtt"))
        beam = (self.beam_width or USUAL_BEAMS) if self.use_beam_search else 1
        return Hearing(beam=beam, language=self.language or None, prompt=self.prompt or "", words=wanted)


FORM: Schema = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "model": {**TEXT, "minLength": 1},
        "language": {**TEXT, "maxLength": 16},
        "prompt": {**TEXT, "maxLength": MOST_PROMPT},
        "response_format": one_of(*FORMATS),
        "temperature": {"type": "number", "enum": [0]},
        "timestamp_granularities[]": {"type": "array", "items": one_of("word", "segment"), "maxItems": 8},
        "stream": {"type": "boolean"},
        "use_beam_search": {"type": "boolean"},
        "beam_width": integer_from(1, MOST_BEAMS),
    },
    "required": ["file", "model"],
    "additionalProperties": False,
}
"""How the form is described."""


def parse_form(fields: Mapping[str, str], lists: Mapping[str, Sequence[str]]) -> TranscriptionRequest:
    """A request from a form's fields, which are texts; one that is empty is absent.

    Raises:
        RequestError: see `fields.parse`.
    """
    body: dict[str, Any] = {}
    for name, value in fields.items():
        plain = re.split(r"\[", name, maxsplit=1)[0]
        if plain in UNSUPPORTED:
            reason = f"'{plain}' is not supported here: {UNSUPPORTED[plain]}"
            raise RequestError(reason, param=plain, code="unsupported_parameter")
        body[name] = _value(name, value) if value or name == "model" else None
    for name, values in lists.items():
        body.setdefault(name.removesuffix("[]"), []).extend(values)
    return parse(TranscriptionRequest, json.dumps(body).encode())


def _value(name: str, text: str) -> Any:
    """What a text means where its field is none."""
    if name in ("stream", "use_beam_search"):
        return {"true": True, "false": False}.get(text.lower(), text)
    if name == "beam_width" and INTEGER.fullmatch(text):
        return int(text)
    if name == "temperature" and NUMBER.fullmatch(text):
        return float(text)
    return text


class AudioTokens(msgspec.Struct, frozen=True):
    """Of what was heard."""

    audio_tokens: int
    text_tokens: int = 0


class TokensUsage(msgspec.Struct, frozen=True, tag_field="type", tag="tokens"):
    """What is paid for: tenths of a second that were heard, tokens that were written."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_token_details: AudioTokens
    cost: float
    """Dollars."""


class DurationUsage(msgspec.Struct, frozen=True, tag_field="type", tag="duration"):
    """The same, by its length."""

    seconds: float
    cost: float
    """Dollars."""


class TranscriptSegment(msgspec.Struct, frozen=True):
    """A piece of a recording."""

    id: int
    seek: int
    """Hundredths of a second before it."""
    start: float
    end: float
    text: str
    tokens: list[int]
    """Of the model's vocabulary, or numbers of characters."""
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class Transcription(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was said; from `task` on, of verbose_json alone."""

    text: str
    usage: TokensUsage | DurationUsage
    task: Literal["transcribe"] | msgspec.UnsetType = msgspec.UNSET
    language: str | msgspec.UnsetType = msgspec.UNSET
    duration: float | msgspec.UnsetType = msgspec.UNSET
    segments: list[TranscriptSegment] | msgspec.UnsetType = msgspec.UNSET
    words: list[Word] | msgspec.UnsetType = msgspec.UNSET


class TextDelta(msgspec.Struct, frozen=True, tag_field="type", tag="transcript.text.delta"):
    """More of a transcript."""

    delta: str


class TextDone(msgspec.Struct, frozen=True, tag_field="type", tag="transcript.text.done"):
    """All of it."""

    text: str
    usage: TokensUsage
