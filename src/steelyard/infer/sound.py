"""What is said of sounds between the HTTP process and an engine process: how a piece is heard, what is known of it.

Plain structs, no torch: see `request.py`, whose messages hold them.
"""

from __future__ import annotations

import msgspec

from steelyard.errors import RequestError

SOUND_RATE = 16_000
SAMPLE_BYTES = 4
TOKEN_SAMPLES = SOUND_RATE // 10
"""Of sound: a token is a tenth of a second, begun or whole."""


def sound_tokens(samples: int) -> int:
    """What a piece of sound is paid for."""
    return max(1, -(-samples // TOKEN_SAMPLES))


MOST_BEAMS = 64


class Hearing(msgspec.Struct, frozen=True, kw_only=True):
    """How a piece of a recording is heard."""

    beam: int = 1
    """Beginnings of a transcript that are kept; 1 takes the likeliest token, or character, at each place."""
    language: str | None = None
    """What is spoken, by its code; None: what the model takes for granted."""
    prompt: str = ""
    """What was said before, or as it might have been."""
    words: bool = False
    """Whether it is told when each word is said."""


class Word(msgspec.Struct, frozen=True):
    """A word, and when it was said."""

    word: str
    start: float
    """Seconds from the beginning of what was heard."""
    end: float


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a transcript besides its text."""

    average_logprob: float
    """Of its tokens, the end included; of characters, of the likeliest way to spell it, by place."""
    no_speech: float
    """How likely it is that nothing was said."""
    words: list[Word] | None = None
    """Where they are wanted."""


class Hears(msgspec.Struct, frozen=True, kw_only=True):
    """What a model that hears takes, and writes."""

    piece: int
    """Most samples of a request; what is longer is heard in pieces."""
    written: int
    """Most tokens, or characters, that a transcript of a piece has."""
    written_per_token: int | None = None
    """Most of them for each token of sound; None: a piece may have all, however short it is."""
    languages: list[str]
    """Codes of those that it can be told, the one that it takes for granted first; empty: it cannot be told any."""
    prompts: bool
    """Whether it can be told what was said before."""
    words: bool
    """Whether it can say when each word is said."""
    beams: int = MOST_BEAMS
    """Most beginnings of a transcript that it keeps: each holds what it has heard."""


def most_written(hears: Hears, samples: int) -> int:
    """Tokens, or characters, that a transcript of a piece of so many samples has at the most."""
    per_token = hears.written_per_token
    return hears.written if per_token is None else min(hears.written, per_token * sound_tokens(samples))


def check(hears: Hears, hearing: Hearing, model: str = "this model") -> None:
    """See that a model hears so.

    Raises:
        RequestError: it does not; the field is named.
    """
    if not 1 <= hearing.beam <= hears.beams:
        raise RequestError(f"'beam_width' of {model} must be 1 to {hears.beams}", param="beam_width")
    if hearing.language is not None and hearing.language not in hears.languages:
        known = f"one of {', '.join(hears.languages)}" if hears.languages else "absent: it is not told any"
        raise RequestError(f"'language' of {model} must be {known}", param="language")
    if hearing.prompt.strip() and not hears.prompts:
        raise RequestError(f"{model} takes no 'prompt': leave it out", param="prompt")
    if hearing.words and not hears.words:
        reason = f"{model} does not say when a word is said: 'timestamp_granularities' must be segment"
        raise RequestError(reason, param="timestamp_granularities")
